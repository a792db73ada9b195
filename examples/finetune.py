"""Fine-tune a real sentence encoder on real text through FusedLoRALinear, on a CPU, in minutes.

Three runs with the same seed, batches and initial values: the frozen base with a trained linear
head, the same plus LoRA in plain PyTorch, the same plus FusedLoRALinear. The last two must give
the same losses; the exit status is 1 if they do not. README.md beside this file says more.

    python examples/finetune.py
    torchrun --nproc-per-node 2 examples/finetune.py
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer

import fused_lora

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

EVAL_BATCH = 64
HEAD_LR = 1e-2  # the best of 1e-3 ... 5e-2 for the frozen base, which makes it a fair baseline
# The largest |fused loss - plain loss| allowed. The two layers round differently, and AdamW carries
# that from step to step. Seen: 2e-7 in 100 steps of float32, 6e-4 in 20 steps of bfloat16.
LOSS_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}
FROZEN, PLAIN, FUSED = "frozen base", "plain LoRA", "fused LoRA"


class PlainLoRALinear(nn.Module):
    """y = x W^T + bias + scaling * (x A^T) B^T in plain PyTorch: what we compare with."""

    def __init__(self, linear: nn.Linear, r: int, lora_alpha: float, adapter_dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # [N, K], [N]
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, dtype=adapter_dtype))
        self.scaling = lora_alpha / r

    def forward(self, x: Tensor) -> Tensor:
        S = F.linear(x, self.lora_A.to(x.dtype))  # [..., r]
        update = F.linear(S, self.lora_B.to(x.dtype)) * self.scaling
        return F.linear(x, self.weight, self.bias) + update  # [..., N]


class Classifier(nn.Module):
    """A linear head on the mean of the encoder's token states."""

    def __init__(self, encoder: nn.Module, classes: int, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes, dtype=dtype)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states.to(self.head.weight.dtype)  # [sentences, tokens, hidden]
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(mean)


def add_adapters(
    encoder: nn.Module, targets: list[str], seed: int, adapt: Callable[[nn.Linear], nn.Module]
) -> None:
    """Replace each nn.Linear whose dotted name ends in a target; one seed, one set of A."""
    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f"no linear layer is called {target!r}: the model has {names}")
    generator = torch.Generator().manual_seed(seed)
    for name in linears:
        if any(f".{name}".endswith(f".{target}") for target in targets):
            parent, _, child = name.rpartition(".")
            layer = adapt(encoder.get_submodule(name))
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
            setattr(encoder.get_submodule(parent), child, layer)


def build(
    kind: str, encoder: nn.Module, classes: int, args: argparse.Namespace, device: torch.device
) -> Classifier:
    """Return one run's model: a copy of the frozen encoder, a head, and `kind`'s adapters."""
    torch.manual_seed(args.seed)
    trained = torch.promote_types(encoder.dtype, torch.float32)  # head and adapters
    model = Classifier(copy.deepcopy(encoder), classes, trained)
    model.encoder.requires_grad_(False)

    def plain(linear: nn.Linear) -> nn.Module:
        return PlainLoRALinear(linear, args.r, args.lora_alpha, trained)

    def fused(linear: nn.Linear) -> nn.Module:
        return fused_lora.FusedLoRALinear.from_linear(
            linear,
            r=args.r,
            lora_alpha=args.lora_alpha,
            adapter_dtype=trained,
            backend=args.backend,
        )

    if kind != FROZEN:
        add_adapters(model.encoder, args.targets, args.seed, plain if kind == PLAIN else fused)
    # eval() switches the encoder's dropout off: the runs then differ in nothing but the layer.
    return model.to(device).eval()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


@dataclass
class Run:
    """What one training run leaves behind; accuracies are on the held-out examples."""

    name: str
    trainable: int
    losses: list[float]
    accuracy_before: float
    accuracy_after: float
    seconds_per_step: float

    @property
    def last_loss(self) -> float:
        return statistics.mean(self.losses[-10:])


@torch.no_grad()
def accuracy(model: Classifier, held_out: data.Encoded, device: torch.device) -> float:
    right = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(rank() * EVAL_BATCH, len(held_out), world() * EVAL_BATCH):
        ids, mask, labels = data.collate(held_out[start : start + EVAL_BATCH], device)
        right += (model(ids, mask).argmax(-1) == labels).sum()
    return sum_over_ranks(right) / len(held_out)


def train(
    name: str,
    model: Classifier,
    train_set: data.Encoded,
    held_out: data.Encoded,
    batches: list[list[int]],
    lr: float,
    device: torch.device,
) -> Run:
    """Train head and adapters with AdamW, the learning rates falling linearly to zero."""
    before = accuracy(model, held_out, device)
    adapters = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    head = list(model.head.parameters())
    optimizer = torch.optim.AdamW([{"params": head, "lr": HEAD_LR}, {"params": adapters, "lr": lr}])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    losses, seconds = [], []
    progress = Progress(name, len(batches))
    for batch in batches:
        start = time.perf_counter()
        mine = batch[rank() :: world()]  # DDP averages the gradients of the ranks' equal shares
        ids, mask, labels = data.collate([train_set[index] for index in mine], device)
        loss = F.cross_entropy(parallel(ids, mask), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(sum_over_ranks(loss.detach()) / world())
        seconds.append(time.perf_counter() - start)
        progress.step(losses[-1])
    progress.close()
    return Run(
        name=name,
        trainable=sum(parameter.numel() for parameter in head + adapters),
        losses=losses,
        accuracy_before=before,
        accuracy_after=accuracy(model, held_out, device),
        seconds_per_step=statistics.median(seconds),
    )


class Progress:
    """tqdm's bar, or a line every ten steps where tqdm is not installed; only rank 0 shows it."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.done = name, steps, 0
        self.bar = tqdm(total=steps, desc=name, disable=rank() != 0) if tqdm else None

    def step(self, loss: float) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.bar.update()
        elif rank() == 0 and (self.done % 10 == 0 or self.done == self.steps):
            print(f"{self.name}: step {self.done}/{self.steps}, loss {loss:.4f}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def paths(model: nn.Module, tokens: int) -> str:
    """Say which path the fused layers take for that many tokens, alike layers in one entry."""
    layers = [m for m in model.modules() if isinstance(m, fused_lora.FusedLoRALinear)]
    x = layers[0].weight.new_empty(tokens, 1)  # explain reads its rows, dtype and device
    counts = Counter(fused_lora.explain(layer, x) for layer in layers)
    return "\n".join(f"{count} x {text}" for text, count in counts.items())


def table(runs: list[Run]) -> str:
    """Format the runs, one a line."""
    rows = [
        ("run", "trainable", "first loss", "last loss", "acc before", "acc after", "s/step"),
        *(
            (
                run.name,
                f"{run.trainable:,}",
                f"{run.losses[0]:.4f}",
                f"{run.last_loss:.4f}",
                f"{run.accuracy_before:.1%}",
                f"{run.accuracy_after:.1%}",
                f"{run.seconds_per_step:.3f}",
            )
            for run in runs
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers folder (default: MiniLM-L6)")
    parser.add_argument("--data", type=Path, help="file of label<TAB>text (default: film reviews)")
    parser.add_argument(
        "--cache", type=Path, default=data.default_cache(), help="downloads go here"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes together")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapters")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora-alpha", type=float, default=16)
    parser.add_argument(
        "--targets",
        type=lambda names: names.split(","),
        default=["query", "value"],
        help="comma-separated ends of the adapted linear layers' names (default: query,value)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=LOSS_TOLERANCE, default="float32", help="of the encoder")
    parser.add_argument("--backend", choices=["auto", "aten", "triton"], default="auto")
    parser.add_argument("--quick", action="store_true", help="at most 20 steps, 256 held out")
    parser.add_argument(
        "--output", type=data.new_file, help="write the settings and results as JSON"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = min(args.steps, 20)
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")
    if args.backend == "triton" and args.device == "cpu":
        parser.error("--backend triton needs --device cuda: the kernels run on a GPU")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error("--batch-size must be a multiple of the number of processes")
    return args


def finetune(args: argparse.Namespace, device: torch.device) -> int:
    """Do the three runs, print the table; return 0 if the two LoRA runs agree, else 1."""
    started = time.perf_counter()
    show = print if rank() == 0 else lambda *_: None
    if rank() != 0:
        dist.barrier()  # let rank 0 download: it joins this barrier when the files are there
    model_folder = args.model or data.fetch_model(args.cache)
    data_file = args.data or data.fetch_reviews(args.cache)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()

    examples = data.load_examples(data_file)
    classes = sorted({example.label for example in examples})
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    train_set, held_out = (data.encode(part, classes, tokenizer) for part in data.split(examples))
    if args.quick:
        held_out = held_out[:: math.ceil(len(held_out) / 256)]  # of every length
    batches = data.schedule(len(train_set), args.steps, args.batch_size, args.seed)
    encoder = AutoModel.from_pretrained(model_folder, local_files_only=True)
    encoder = encoder.to(getattr(torch, args.dtype))
    show(
        f"{model_folder.name} in {args.dtype} on {world()} x {device.type}; "
        f"{len(train_set)} examples to train on, {len(held_out)} held out, classes {classes}"
    )

    runs = []
    for kind in (FROZEN, PLAIN, FUSED):
        model = build(kind, encoder, len(classes), args, device)
        if kind == FUSED:
            show(paths(model, args.batch_size // world() * data.MAX_TOKENS))
        runs.append(train(kind, model, train_set, held_out, batches, args.lr, device))

    _, plain, fused = runs
    difference = max(abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True))
    tolerance = LOSS_TOLERANCE[args.dtype]
    agree = difference <= tolerance  # False for NaN too
    show(f"\n{table(runs)}\n")
    show(
        f"max |fused loss - plain loss| over {args.steps} steps: {difference:.1e}, "
        f"{'within' if agree else 'OUTSIDE'} the tolerance {tolerance:.0e} for {args.dtype}"
    )
    total = time.perf_counter() - started
    show(f"{total:.0f} s in all")
    if args.output and rank() == 0:
        report = {
            "settings": {k: v for k, v in vars(args).items() if k not in ("cache", "output")},
            "processes": world(),
            "versions": {"torch": torch.__version__, "fused_lora": fused_lora.__version__},
            "runs": [{**asdict(run), "last_loss": run.last_loss} for run in runs],
            "max_loss_difference": difference,
            "tolerance": tolerance,
            "agree": agree,
            "seconds": total,
        }
        args.output.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0 if agree else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device)
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        status = finetune(args, device)
        if dist.is_initialized():
            dist.barrier()  # leaving early could abort the others at their end
        return status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:  # of what was given: the message says all
        sys.exit(f"finetune.py: {error}")
