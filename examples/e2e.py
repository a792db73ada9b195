"""The LoRA paper's restaurant descriptions on a small language model: which rank, which matrices.

Trains adapters of several ranks on the query and value projections, adapters on other matrices with
as many parameters, and the whole model, each from several seeds, and scores held-out meaning
representations: loss of the reference texts, and BLEU, NIST and ROUGE-L of greedy generation with
merged adapters. It stops and goes on where it was; README.md beside this file says more.

    python examples/e2e.py --data DIRECTORY
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import e2e_report
import torch
import torch.nn.functional as F
from e2e_report import FROZEN, FULL, REFERENCE, REFERENCE_RANK
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import fused_lora
from fused_lora.places import find_targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import machine

TARGETS: dict[str, str | list[str]] = {
    "q": ["q_proj"],
    "q,v": ["q_proj", "v_proj"],
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": "all-linear",
}
# lora_alpha of each --scaling, alpha / sqrt(r) or the paper's alpha / r: both are 2 at r = 16
ALPHAS = {"rslora": 8.0, "lora": 32.0}
LORA_RATES, FULL_RATES = (3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4)
PARTS = ("ranks", "targets", "full", "rates")
MAX_TOKENS = 256  # the longest pair has about 200
OPEN_SLOTS = ("name", "near")  # their values are copied into the text, whatever they are
SAVE_EVERY = 50  # steps
EVAL_BATCH = 16


class Corpus(NamedTuple):
    """Pairs to train on, and the held-out texts of each meaning representation."""

    train: list[data.Pair]
    dev: dict[str, list[str]]
    test: dict[str, list[str]]


class Cell(NamedTuple):
    """One training run: what is trained, how fast, from which seed, and what it is scored on."""

    kind: str  # FROZEN, FULL, or a key of TARGETS
    r: int  # 0 without adapters
    lr: float
    seed: int
    split: str = "test"

    @property
    def name(self) -> str:
        kind = self.kind.replace(",", "")
        return f"{kind}-r{self.r}-lr{self.lr:g}-seed{self.seed}-{self.split}"


class OutOfTime(Exception):
    """--minutes have passed, and everything is saved."""


def load_corpus(path: Path) -> list[data.Pair]:
    """The pairs of a file, or of all .txt files of a folder."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return [pair for file in files for pair in data.load_pairs(file)]


def meaning(source: str) -> tuple[str, ...]:
    """The slots of a meaning representation, `name : The Mill | area : riverside`, in one order."""
    return tuple(sorted(" ".join(slot.split()).casefold() for slot in source.split("|")))


def family(source: str) -> str:
    """What a meaning representation says apart from its open slots: it decides the split."""
    slots = (slot for slot in meaning(source) if slot.split(" :")[0] not in OPEN_SLOTS)
    return " | ".join(slots)


def split(pairs: list[data.Pair]) -> Corpus:
    """Eight parts to train on, one for choices (dev) and one for results (test).

    The side of a pair is a hash of its `family` alone: representations that differ only in their
    names are on one side, whatever the order of slots, pairs and files. A training text that is
    also a held-out one is dropped. Raises ValueError if a side is left empty.
    """
    train: list[data.Pair] = []
    held_out: tuple[dict, dict] = {}, {}
    for pair in pairs:
        side = _digest(family(pair.source))[0] % 10
        if side > 1:
            train.append(pair)
        else:
            _, texts = held_out[side].setdefault(meaning(pair.source), (pair.source, []))
            texts.append(pair.target)
    dev, test = (
        dict(sorted(part.values(), key=lambda group: _digest(group[0]))) for part in held_out
    )
    known = {text for part in (dev, test) for texts in part.values() for text in texts}
    train = [pair for pair in train if pair.target not in known]
    if not (train and dev and test):
        raise ValueError(
            f"the split left {len(train)} pairs to train on, {len(dev)} dev and {len(test)} test "
            "meaning representations, expected some of each: give more data"
        )
    return Corpus(train, dev, test)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def plan(args: argparse.Namespace, sizes: dict[str, int]) -> list[Cell]:
    """The runs in the order they are done, seed by seed. `sizes` holds the parameters of the kinds'
    adapters at r = 1: those of the targets part have as many as q,v at REFERENCE_RANK."""
    budget = REFERENCE_RANK * sizes[REFERENCE]
    cells = []
    if "rates" in args.parts:
        cells += [Cell(REFERENCE, REFERENCE_RANK, lr, 0, "dev") for lr in LORA_RATES]
        cells += [Cell(FULL, 0, lr, 0, "dev") for lr in FULL_RATES]
    if set(args.parts) - {"rates"}:
        cells.append(Cell(FROZEN, 0, 0.0, 0))
        for seed in range(args.seeds):
            adapted = [(REFERENCE, REFERENCE_RANK)]
            if "ranks" in args.parts:
                adapted += [(REFERENCE, r) for r in args.ranks]
            if "targets" in args.parts:
                adapted += [(kind, max(1, round(budget / sizes[kind]))) for kind in TARGETS]
            cells += [Cell(kind, r, args.lr, seed) for kind, r in adapted]
            if "full" in args.parts:
                cells.append(Cell(FULL, 0, args.full_lr, seed))
    return list(dict.fromkeys(cells))


def adapter_sizes(folder: Path) -> dict[str, int]:
    """Parameters of the adapters on each kind of TARGETS, at r = 1."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config)
    sizes = {}
    for kind, targets in TARGETS.items():
        layers = [model.get_submodule(path) for path in find_targets(model, targets)]
        sizes[kind] = sum(layer.in_features + layer.out_features for layer in layers)
    return sizes


def build(cell: Cell, folder: Path, args: argparse.Namespace) -> nn.Module:
    """The pretrained model, with what the cell trains set to train and everything else frozen.

    Under bfloat16 what is trained stays in float32; the whole model is then computed by autocast.
    In eval mode, so that a model's own dropout is off in all runs.
    """
    dtype = torch.float32 if cell.kind == FULL else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    model.requires_grad_(cell.kind == FULL)
    if cell.kind in TARGETS:
        torch.manual_seed(cell.seed)
        fused_lora.apply_lora(
            model,
            r=cell.r,
            lora_alpha=ALPHAS[args.scaling],
            use_rslora=args.scaling == "rslora",
            target_modules=TARGETS[cell.kind],
            adapter_dtype=torch.float32,
            backend=args.backend,
        )
        fused_lora.mark_only_lora_as_trainable(model)
    return model.to(args.device).eval()


def reference_loss(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """Cross-entropy of the tokens of the reference texts, each given all before it."""
    labels = batch["labels"][:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # [examples, tokens, vocabulary]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=reduction)


def train(
    cell: Cell,
    model: nn.Module,
    examples: data.Encoded,
    args: argparse.Namespace,
    checkpoint: Path,
    deadline: float,
) -> tuple[list[float], list[float]]:
    """Train with AdamW, a tenth of the steps warming up, then falling linearly to zero; returns the
    loss and the seconds of every step. Goes on from `checkpoint` if it is there, exactly as if it
    had never stopped. `examples` are sorted by length. Raises OutOfTime after `deadline`."""
    device = torch.device(args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cell.lr, weight_decay=0.0)
    losses: list[float] = []
    seconds: list[float] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(trained, saved["trained"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        losses, seconds = saved["losses"], saved["seconds"]
    batches = data.schedule(len(examples), args.steps, args.batch_size, cell.seed)
    warmup = max(1, args.steps // 10)
    with tqdm(total=args.steps, initial=len(losses), desc=cell.name, leave=False) as bar:
        for step in range(len(losses), args.steps):
            start = time.perf_counter()
            fraction = min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = cell.lr * fraction
            batch = data.collate_pairs([examples[index] for index in batches[step]], device)
            with autocast(cell, args):
                loss = reference_loss(model, batch, "mean")
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
            late = time.monotonic() > deadline
            if late or (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                state = {
                    "trained": [parameter.detach() for parameter in trained],
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "seconds": seconds,
                }
                with replaced(checkpoint) as path:
                    torch.save(state, path)
            if late:
                raise OutOfTime
    return losses, seconds


def autocast(cell: Cell, args: argparse.Namespace) -> contextlib.AbstractContextManager:
    enabled = cell.kind == FULL and args.dtype == "bfloat16"
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: data.Encoded, device: torch.device) -> float:
    """Mean loss of a token, over all tokens of all references."""
    total, tokens = 0.0, 0
    for start in range(0, len(examples), EVAL_BATCH):
        batch = data.collate_pairs(examples[start : start + EVAL_BATCH], device)
        total += reference_loss(model, batch, "sum").item()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return total / tokens


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, sources: list[str], new_tokens: int, device: torch.device
) -> list[str]:
    """A text for each meaning representation, by greedy decoding."""
    eos = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=eos
    )
    texts = []
    for start in range(0, len(sources), EVAL_BATCH):
        prompts = [data.encode_source(s, tokenizer) for s in sources[start : start + EVAL_BATCH]]
        width = max(map(len, prompts))
        ids = torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
        for row in output[:, width:]:
            texts.append(" ".join(tokenizer.decode(row, skip_special_tokens=True).split()))
    return texts


def run(
    cell: Cell, folder: Path, corpus: Corpus, args: argparse.Namespace, state: Path, deadline: float
) -> dict[str, Any]:
    """Train and score one cell; returns what the report needs of it."""
    device = torch.device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = build(cell, folder, args)
    losses: list[float] = []
    seconds: list[float] = []
    if cell.kind != FROZEN:
        examples = data.encode_pairs(corpus.train, tokenizer, MAX_TOKENS)
        examples.sort(key=lambda example: len(example[0]))
        checkpoint = state / f"{cell.name}.pt"
        losses, seconds = train(cell, model, examples, args, checkpoint, deadline)

    groups = scored(corpus, cell.split, args)
    pairs = [data.Pair(source, text) for source, texts in groups.items() for text in texts]
    record = cell._asdict() | {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": losses,
        "seconds_per_step": statistics.median(seconds) if seconds else None,
    }
    with autocast(cell, args):
        held_out = data.encode_pairs(pairs, tokenizer, MAX_TOKENS)
        record["loss"] = held_out_loss(model, held_out, device)
        if cell.split == "test":
            if cell.kind in TARGETS:
                fused_lora.merge_adapter(model)
            record["generated"] = generate(model, tokenizer, list(groups), args.new_tokens, device)
    return record


def scored(corpus: Corpus, split: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """The meaning representations that are scored, and their reference texts."""
    return dict(list(getattr(corpus, split).items())[: args.held_out])


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes `path` in one step once it is on the disk."""
    scratch = path.with_name(path.name + ".tmp")
    yield scratch
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)


def state_folder(args: argparse.Namespace, folder: Path, pairs: list[data.Pair]) -> Path:
    """Where runs with these settings, this model and these data are kept."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.name.encode() + file.read_bytes())
    for pair in sorted(pairs):
        digest.update(repr(tuple(pair)).encode())
    names = (
        "steps",
        "batch_size",
        "held_out",
        "new_tokens",
        "device",
        "dtype",
        "backend",
        "scaling",
    )
    settings = {name: getattr(args, name) for name in names} | {"torch": torch.__version__}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return (args.state or args.cache / "e2e") / digest.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    logging.disable_progress_bar()  # one bar for every model that is read
    for name, reason in e2e_report.missing().items():
        print(f"no {name}: {reason}")
    pairs = load_corpus(args.data)
    corpus = split(pairs)
    folder = args.model or data.fetch_smollm2_dequantised(args.cache)
    cells = plan(args, adapter_sizes(folder))
    state = state_folder(args, folder, pairs)
    state.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(corpus.train)} pairs to train on; {len(corpus.dev)} dev and {len(corpus.test)} test "
        f"meaning representations, {args.held_out} of them scored; {len(cells)} runs, kept in "
        f"{state}"
    )
    records, references = [], list(scored(corpus, "test", args).values())
    with tqdm(total=len(cells), desc="runs") as bar:
        for cell in cells:
            finished = state / f"{cell.name}.json"
            if not finished.exists():
                try:
                    if time.monotonic() > deadline:
                        raise OutOfTime
                    record = run(cell, folder, corpus, args, state, deadline)
                except OutOfTime:
                    break
                with replaced(finished) as path:
                    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
                (state / f"{cell.name}.pt").unlink(missing_ok=True)
            record = json.loads(finished.read_text(encoding="utf-8"))
            if "generated" in record:
                record |= e2e_report.scores(record["generated"], references)
            records.append(record)
            bar.update()
    settings = {k: v for k, v in vars(args).items() if k not in ("cache", "state", "output")}
    settings |= {"model": folder.name, "data": args.data.name}
    sizes = {"train": len(corpus.train), "dev": len(corpus.dev), "test": len(corpus.test)}
    print(e2e_report.text(records))
    if len(records) < len(cells):
        print(f"{len(records)} of {len(cells)} runs are done: the same command goes on")
    elif args.output:
        report = e2e_report.as_json(records, settings, sizes)
        report["machine"] = {
            "name": machine.device_name(torch.device(args.device)),
            "threads": torch.get_num_threads(),
        }
        report |= {"date": datetime.date.today().isoformat(), **machine.commit()}
        report["fingerprint"] = state.name  # of settings, model and data
        with replaced(args.output) as path:
            path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        print(e2e_report.plot(records, args.output.with_suffix(".png")))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of .txt files, or one: source||target")
    parser.add_argument("--model", type=Path, help="transformers folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--cache", type=Path, default=data.default_cache(), help="downloads and runs go here"
    )
    parser.add_argument("--state", type=Path, help="where runs are kept (default: in the cache)")
    parser.add_argument(
        "--output", type=data.new_file, help="JSON file of the results, a PNG beside it"
    )
    parser.add_argument(
        "--parts",
        type=several(str),
        default=list(PARTS[:3]),
        help="of ranks,targets,full,rates (default: the first three)",
    )
    parser.add_argument("--ranks", type=several(int), default=[1, 4, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the adapters")
    parser.add_argument("--full-lr", type=float, default=1e-4, help="of the whole model")
    parser.add_argument(
        "--scaling", choices=ALPHAS, default="rslora", help="8 / sqrt(r), or the paper's 32 / r"
    )
    parser.add_argument(
        "--held-out", type=int, default=48, help="meaning representations that are scored"
    )
    parser.add_argument("--new-tokens", type=int, default=80, help="of a generated text, at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["auto", "aten", "triton"], default="auto")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be continued")
    parser.add_argument("--quick", action="store_true", help="one seed, 10 steps of 4: a try-out")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.batch_size = 1, min(args.steps, 10), min(args.batch_size, 4)
        args.ranks, args.held_out = args.ranks[::2], min(args.held_out, 4)
        args.new_tokens = min(args.new_tokens, 40)
    counts = (args.seeds, args.steps, args.batch_size, args.held_out, args.new_tokens, *args.ranks)
    if min(counts) < 1:
        parser.error("seeds, steps, sizes, tokens and ranks must be at least 1")
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts has {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    if args.model and not args.model.is_dir():
        parser.error(f"--model {args.model} is no folder: give one that transformers can load")
    if args.data is None or not args.data.exists():
        parser.error(
            f"--data: got {args.data or 'nothing'}, expected a folder of .txt files (or one file) "
            "with a line `source||target` for each pair, such as valid.txt and test.txt of the "
            "E2E NLG challenge in the form the LoRA paper uses"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
