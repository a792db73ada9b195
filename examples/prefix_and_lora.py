"""A prefix or a prompt of PEFT and adapters of this library, trained together on one model.

Three runs with the same seed and batches on film reviews: the prefix alone, LoRA alone, and both.
The base must stay as it was, bit for bit, and both parts, saved by their own libraries and loaded
into a fresh base, must give the same logits; the exit status is 1 if not. README.md says more.

    python examples/prefix_and_lora.py
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fused_lora

QUESTION = "Is this review of a film positive or negative?"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
LORA_LR, PROMPT_LR = 1e-3, 1e-2
EVAL_BATCH = 32


class Run(NamedTuple):
    """One training run; loss and accuracy are on the held-out reviews, before and after."""

    name: str
    trainable: int
    losses: list[float]
    before: tuple[float, float]
    after: tuple[float, float]


def load_base(folder: Path, device: str) -> nn.Module:
    """The pretrained model in float32, in eval mode: its own dropout is off in all runs."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.to(device).eval()


def build(
    base: nn.Module, method: str | None, lora: bool, folder: Path, args: argparse.Namespace
) -> nn.Module:
    """PEFT's part first, for it freezes all of the model that it finds; then the adapters, in the
    base, not in PEFT's wrapper around it: their files then fit the base without the prompt too."""
    base.requires_grad_(False)
    model = base
    torch.manual_seed(args.seed)
    if method == "prefix":
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.virtual_tokens)
        model = get_peft_model(base, prefix)
    elif method == "prompt":
        prompt = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.virtual_tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=QUESTION,
            tokenizer_name_or_path=str(folder),
        )
        model = get_peft_model(base, prompt)
    if lora:
        torch.manual_seed(args.seed)
        fused_lora.apply_lora(base, **LORA)
    return model.to(args.device)


@torch.no_grad()
def score(
    model: nn.Module, held_out: data.Encoded, classes: list[int], device: torch.device
) -> tuple[float, float]:
    """Mean loss of a label, and how often the right one is the likelier."""
    loss, right = 0.0, 0
    for start in range(0, len(held_out), EVAL_BATCH):
        part = held_out[start : start + EVAL_BATCH]
        batch = data.collate_pairs(part, device)
        output = model(**batch)
        loss += output.loss.item() * len(part)
        for row, (ids, given) in enumerate(part):
            # a prompt makes the sequence longer in front
            place = output.logits.shape[1] - batch["input_ids"].shape[1] + given - 1
            found = output.logits[row, place, classes].argmax().item()
            right += classes[int(found)] == ids[given]
    return loss / len(held_out), right / len(held_out)


def train(
    name: str,
    model: nn.Module,
    batches: list[data.Encoded],
    held_out: data.Encoded,
    classes: list[int],
    device: torch.device,
) -> Run:
    before = score(model, held_out, classes, device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lora = [p for name, p in trained.items() if "lora_" in name]
    prompt = [p for name, p in trained.items() if "lora_" not in name]
    groups = [{"params": lora, "lr": LORA_LR}, {"params": prompt, "lr": PROMPT_LR}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    losses = []
    with tqdm(batches, desc=name) as bar:
        for batch in bar:
            loss = model(**data.collate_pairs(batch, device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    size = sum(parameter.numel() for parameter in trained.values())
    return Run(name, size, losses, before, score(model, held_out, classes, device))


def reloaded(base: nn.Module, model: PeftModel, folder: Path, device: str) -> nn.Module:
    """Both parts saved, each by its own library, and loaded into a fresh base."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(Path(scratch, "prompt"))
        fused_lora.save_adapter(base, Path(scratch, "lora"))
        fresh = load_base(folder, device)
        loaded = PeftModel.from_pretrained(fresh, Path(scratch, "prompt"))
        fused_lora.load_adapter(fresh, Path(scratch, "lora"))
    return loaded.to(device).eval()


def same_base(base: nn.Module, folder: Path, device: str) -> bool:
    """Whether every tensor of `base` is that of the files, bit for bit."""
    state, original = base.state_dict(), load_base(folder, device).state_dict()
    return all(torch.equal(state[name], value) for name, value in original.items())


def encode(
    examples: list[data.Example], tokenizer: Any
) -> tuple[data.Encoded, dict[str, list[int]]]:
    pairs = [data.Pair(f"{example.text}\n{QUESTION}", example.label) for example in examples]
    labels = {example.label for example in examples}
    words = {w: tokenizer(w, add_special_tokens=False)["input_ids"] for w in sorted(labels)}
    return data.encode_pairs(pairs, tokenizer, 2 * data.MAX_TOKENS), words


def table(runs: list[Run]) -> str:
    rows = [("run", "trainable", "first loss", "last loss", "held-out loss", "accuracy")]
    for run in runs:
        last = sum(run.losses[-10:]) / len(run.losses[-10:])
        loss, accuracy = zip(run.before, run.after, strict=True)
        cells = (f"{run.trainable:,}", f"{run.losses[0]:.4f}", f"{last:.4f}")
        cells += ("{:.4f} -> {:.4f}".format(*loss), "{:.1%} -> {:.1%}".format(*accuracy))
        rows.append((run.name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.disable_progress_bar()  # one bar for every model that is read
    device = torch.device(args.device)
    folder = args.model or data.fetch_smollm2_dequantised(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    parts = data.split(data.load_examples(args.data or data.fetch_reviews(args.cache)))
    (train_set, words), (held_out, _) = (encode(part, tokenizer) for part in parts)
    classes = [ids[0] for ids in words.values()]
    if len(set(classes)) < len(classes):
        raise ValueError(f"the labels {list(words)} begin with the same token: name them apart")
    held_out = held_out[:: max(1, len(held_out) // args.held_out)][: args.held_out]
    train_set.sort(key=lambda example: len(example[0]))
    batches = [
        [train_set[index] for index in indices]
        for indices in data.schedule(len(train_set), args.steps, args.batch_size, args.seed)
    ]
    runs = []
    plans = ((args.method, args.method, False), ("LoRA", None, True))
    for name, method, lora in (*plans, (f"{args.method} + LoRA", args.method, True)):
        base = load_base(folder, args.device)
        model = build(base, method, lora, folder, args)
        runs.append(train(name, model, batches, held_out, classes, device))
    print(f"\n{table(runs)}\n")

    probe: dict[str, Tensor] = data.collate_pairs(held_out[:4], device)
    again = reloaded(base, model, folder, args.device)
    with torch.no_grad():
        difference = (model(**probe).logits - again(**probe).logits).abs().max().item()
    untouched = same_base(base, folder, args.device)
    print(f"both saved and loaded into a fresh base: max difference of the logits {difference:.1e}")
    print(f"the base is {'untouched, bit for bit' if untouched else 'CHANGED'}")
    return 0 if untouched and difference == 0 else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["prefix", "prompt"], default="prefix")
    parser.add_argument("--virtual-tokens", type=int, default=8)
    parser.add_argument("--model", type=Path, help="transformers folder (default: SmolLM2-135M)")
    parser.add_argument("--data", type=Path, help="file of label<TAB>text (default: film reviews)")
    parser.add_argument(
        "--cache", type=Path, default=data.default_cache(), help="downloads go here"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=256, help="reviews to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="at most 8 steps, 32 held out")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.held_out = min(args.steps, 8), min(args.held_out, 32)
    if min(args.steps, args.batch_size, args.held_out, args.virtual_tokens) < 1:
        parser.error("steps, sizes and tokens must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
