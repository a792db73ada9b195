"""Fine-tune a real language model with PEFT on restaurant descriptions, unpatched and patched.

Two runs with the same seed, batches and initial values: PEFT's LoRA as it is, and the same after
`fused_lora.integrations.peft.patch(model)`. They must give the same losses, and the adapter that
the patched run saves must load in PEFT and merge; the exit status is 1 if not. README.md beside
this file says more.

    python examples/peft_finetune.py --data DIRECTORY
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_lora
from fused_lora.integrations import peft as fused_peft

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "e2e"
MAX_TOKENS = 128
# The largest |patched loss - unpatched loss| allowed. The layers round differently (in bfloat16
# PEFT computes its fp32 adapters in fp32), and AdamW carries that from step to step.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LOGITS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}  # merging rounds to the base's dtype
UNPATCHED, PATCHED = "PEFT", "PEFT, patched"


@dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    losses: list[float]
    held_out_before: float
    held_out_after: float
    seconds_per_step: float
    peak_mib: float | None

    @property
    def last_loss(self) -> float:
        return statistics.mean(self.losses[-10:])


class PeakMemory:
    """MiB at the highest point since it was made: on a GPU what torch had allocated, on Linux the
    process's resident memory, elsewhere None."""

    def __init__(self, device: torch.device):
        self.device, self.status = device, Path("/proc/self/status")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
        except OSError:
            self.status = Path()

    def mib(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if not self.status.is_file():
            return None
        fields = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10


@torch.no_grad()
def held_out_loss(
    model: nn.Module, examples: data.Encoded, size: int, device: torch.device
) -> float:
    model.eval()
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    return statistics.mean(
        model(**data.collate_pairs(batch, device)).loss.item() for batch in batches
    )


def train(
    name: str,
    model: nn.Module,
    batches: list[data.Encoded],
    held_out: data.Encoded,
    lr: float,
    device: torch.device,
) -> Run:
    before = held_out_loss(model, held_out, len(batches[0]), device)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=lr, weight_decay=0.0)
    model.train()
    losses, seconds, memory = [], [], PeakMemory(device)
    for step, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        loss = model(**data.collate_pairs(batch, device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if step % 10 == 0 or step == len(batches):
            print(f"{name}: step {step}/{len(batches)}, loss {losses[-1]:.4f}", flush=True)
    peak = memory.mib()
    after = held_out_loss(model, held_out, len(batches[0]), device)
    return Run(name, losses, before, after, statistics.median(seconds), peak)


def load_base(args: argparse.Namespace) -> tuple[nn.Module, object]:
    """The language model and its tokenizer, from a transformers folder or one with a .gguf file."""
    folder = args.model or data.fetch_smollm2(args.cache)
    files = sorted(folder.glob("*.gguf"))
    options = {"gguf_file": files[0].name} if files else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    base = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=getattr(torch, args.dtype), **options
    )
    return base.to(args.device), tokenizer


def adapted(base: nn.Module, args: argparse.Namespace) -> PeftModel:
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.r, lora_alpha=args.lora_alpha, target_modules=args.targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def largest_difference(one: nn.Module, other: Tensor, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return (one.eval()(**inputs).logits.float() - other.float()).abs().max().item()


def table(runs: list[Run]) -> str:
    rows = [("run", "first loss", "last loss", "held out", "after", "s/step", "peak MiB")]
    for run in runs:
        numbers = (run.losses[0], run.last_loss, run.held_out_before, run.held_out_after)
        peak = "n/a" if run.peak_mib is None else f"{run.peak_mib:.0f}"
        cells = (*(f"{number:.4f}" for number in numbers), f"{run.seconds_per_step:.3f}", peak)
        rows.append((run.name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def finetune(args: argparse.Namespace) -> int:
    """Do the two runs and the round trip of the adapter; return 0 if all agree, else 1."""
    device = torch.device(args.device)
    base, tokenizer = load_base(args)
    train_set = data.encode_pairs(data.load_pairs(args.data / "valid.txt"), tokenizer, MAX_TOKENS)
    held_out = data.encode_pairs(data.load_pairs(args.data / "test.txt"), tokenizer, MAX_TOKENS)
    held_out = held_out[:: max(1, len(held_out) // args.held_out)][: args.held_out]
    rng = random.Random(args.seed)
    size = min(args.batch_size, len(train_set))
    batches = [rng.sample(train_set, size) for _ in range(args.steps)]
    print(
        f"{type(base).__name__}, {sum(p.numel() for p in base.parameters()):,} parameters in "
        f"{args.dtype} on {device.type}; {len(train_set)} pairs to train on, "
        f"{len(held_out)} held out"
    )

    runs = []
    for name in (UNPATCHED, PATCHED):
        model = adapted(base, args)
        if name == PATCHED:
            print(fused_peft.patch(model, backend=args.backend))
        runs.append(train(name, model, batches, held_out, args.lr, device))
        if name == UNPATCHED:
            base = model.unload()
    counts = fused_peft.call_counts(model)
    routes = Counter(line.split(": ", 1)[1] for line in fused_peft.explain(model).splitlines())
    print("\n".join(f"{count} x {text}" for text, count in routes.items()))

    inputs = data.collate_pairs(held_out[:4], device)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.adapter or Path(scratch, "adapter")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(model.unload(), folder)
    differences = {"reloaded": largest_difference(loaded, logits, inputs)}
    differences["merged"] = largest_difference(loaded.merge_and_unload(), logits, inputs)

    unpatched, patched = runs
    pairs = zip(unpatched.losses, patched.losses, strict=True)
    differences = {"loss": max(abs(a - b) for a, b in pairs)} | differences
    logits_tolerance = LOGITS_TOLERANCE[args.dtype]
    tolerances = {"loss": LOSS_TOLERANCE[args.dtype]}
    tolerances |= {"reloaded": logits_tolerance, "merged": logits_tolerance}
    print(f"\n{table(runs)}\n")
    for what, text in (
        ("loss", f"max |patched loss - unpatched loss| over {args.steps} steps"),
        ("reloaded", "adapter saved and reloaded by PEFT: max difference of the logits"),
        ("merged", "the same merged into the base: max difference of the logits"),
    ):
        verdict = "within" if differences[what] <= tolerances[what] else "OUTSIDE"
        print(f"{text}: {differences[what]:.1e}, {verdict} the tolerance {tolerances[what]:.0e}")
    agree = all(differences[what] <= tolerances[what] for what in tolerances)
    agree = agree and counts["full"] > 0
    if args.output:
        report = {
            "settings": {k: v for k, v in vars(args).items() if k not in ("cache", "output")},
            "versions": {"torch": torch.__version__, "fused_lora": fused_lora.__version__},
            "runs": [{**asdict(run), "last_loss": run.last_loss} for run in runs],
            "calls": counts,
            "differences": differences,
            "tolerances": tolerances,
            "agree": agree,
        }
        args.output.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0 if agree else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers or GGUF folder (default: SmolLM2)")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder of valid.txt and test.txt: source||target"
    )
    parser.add_argument(
        "--cache", type=Path, default=data.default_cache(), help="downloads go here"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32, help="pairs of test.txt to score")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora-alpha", type=float, default=16)
    parser.add_argument(
        "--targets",
        type=lambda names: names.split(","),
        default=["q_proj", "v_proj"],
        help="comma-separated ends of the adapted linear layers' names (default: q_proj,v_proj)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=LOSS_TOLERANCE, default="float32", help="of the base")
    parser.add_argument("--backend", choices=["auto", "aten", "triton"], default="auto")
    parser.add_argument("--adapter", type=Path, help="keep the trained adapter in this folder")
    parser.add_argument(
        "--output", type=data.new_file, help="write the settings and results as JSON"
    )
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size, args.held_out) < 1:
        parser.error("--steps, --batch-size and --held-out must be at least 1")
    missing = [name for name in ("valid.txt", "test.txt") if not (args.data / name).is_file()]
    if missing:
        parser.error(f"--data {args.data} lacks {', '.join(missing)}: give a folder that has them")
    return args


if __name__ == "__main__":
    sys.exit(finetune(parse_args(None)))
