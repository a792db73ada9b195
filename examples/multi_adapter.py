"""Two adapters for two real tasks: trained together in one run, then served in one mixed batch.

The tasks are the sentiment of film reviews and the source of a sentence (tweet, product review or
newspaper editorial). Every batch holds sentences of both; each sentence goes through the adapter of
its task, and the losses are summed. Afterwards each adapter is saved, loaded into a model of its
own, and answers the same held-out sentences there. The exit status is 1 if an answer differs.

    python examples/multi_adapter.py
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from finetune import HEAD_LR, Progress
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import fused_lora

RANKS = {"sentiment": 8, "source": 16}  # of different ranks, because they may be
TARGETS = ("query", "value")
EVAL_BATCH = 64
SERVED = 256  # held-out sentences of each task, about
# The largest difference of two logits allowed: another batch is padded and rounded otherwise.
TOLERANCE = 1e-4


class Tasks(nn.Module):
    """An encoder shared by all tasks, and a linear head on the mean token state for each."""

    def __init__(self, encoder: nn.Module, classes: dict[str, list[str]]):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict({t: nn.Linear(width, len(c)) for t, c in classes.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[sentences, hidden]: unchanged model code, which knows nothing of adapters."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def logits(self, batch: data.Encoded, tasks: list[str], device: torch.device) -> list[Tensor]:
        """One row of logits for each sentence, through the adapter and head of its task."""
        ids, mask, _ = data.collate(batch, device)
        with fused_lora.use_adapters(self.encoder, tasks):
            means = self(ids, mask)
        return [self.heads[task](mean) for task, mean in zip(tasks, means, strict=True)]


def build(encoder: nn.Module, classes: dict[str, list[str]], alpha: float, backend: str) -> Tasks:
    """The model of all tasks: a frozen encoder with an untrained adapter for each."""
    model = Tasks(copy.deepcopy(encoder), classes)
    fused_lora.apply_lora(
        model.encoder,
        adapters={task: {"r": r} for task, r in RANKS.items()},
        lora_alpha=alpha,
        target_modules=TARGETS,
        backend=backend,
    )
    fused_lora.mark_only_lora_as_trainable(model.encoder)
    return model.eval()  # the encoder's dropout off


def alone(folder: str, encoder: nn.Module, task: str, alpha: float, backend: str) -> nn.Module:
    """The encoder with the one adapter of `task`, from the files in `folder`."""
    single = fused_lora.apply_lora(
        copy.deepcopy(encoder),
        r=RANKS[task],
        lora_alpha=alpha,
        target_modules=TARGETS,
        backend=backend,
    )
    return fused_lora.load_adapter(single, folder, name=task).eval()


def train(
    model: Tasks,
    sets: dict[str, data.Encoded],
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
) -> None:
    """Both tasks in every batch, independent losses summed, one backward pass."""
    adapters = [p for p in model.encoder.parameters() if p.requires_grad]
    heads = list(model.heads.parameters())
    groups = [{"params": heads, "lr": HEAD_LR}, {"params": adapters, "lr": lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    share = batch_size // len(sets)
    schedules = {t: data.schedule(len(s), steps, share, seed) for t, s in sets.items()}
    progress = Progress("two adapters", steps)
    for step in range(steps):
        batch, tasks = [], []
        for task, examples in sets.items():
            batch += [examples[index] for index in schedules[task][step]]
            tasks += [task] * share
        logits = model.logits(batch, tasks, device)
        losses = [
            F.cross_entropy(row, torch.tensor(label, device=device))
            for row, (_, label) in zip(logits, batch, strict=True)
        ]
        loss = torch.stack(losses).sum() / share
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        progress.step(loss.item())
    progress.close()


@torch.no_grad()
def serve(model: Tasks, mixed: list[tuple[str, tuple]], device: torch.device) -> list[Tensor]:
    """Logits of (task, sentence) pairs in mixed batches."""
    answers: list[Tensor] = []
    for start in range(0, len(mixed), EVAL_BATCH):
        tasks, sentences = zip(*mixed[start : start + EVAL_BATCH], strict=True)
        answers += model.logits(list(sentences), list(tasks), device)
    return answers


@torch.no_grad()
def serve_alone(
    model: Tasks, single: nn.Module, task: str, held_out: data.Encoded, device: torch.device
) -> list[Tensor]:
    answers: list[Tensor] = []
    for start in range(0, len(held_out), EVAL_BATCH):
        ids, mask, _ = data.collate(held_out[start : start + EVAL_BATCH], device)
        states = single(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        answers += list(model.heads[task](means))
    return answers


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers folder (default: MiniLM-L6)")
    parser.add_argument(
        "--data", type=Path, nargs=2, metavar=("SENTIMENT", "SOURCE"),
        help="two files of label<TAB>text (default: film reviews; sentences of three sources)",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, default=data.default_cache())
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="of both tasks together")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapters")
    parser.add_argument("--lora-alpha", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", choices=["auto", "aten", "triton"], default="auto")
    parser.add_argument("--quick", action="store_true", help="at most 20 steps, fewer sentences")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = min(args.steps, 20)
    if args.batch_size % 2 or args.batch_size < 2:
        parser.error("--batch-size must be even: each task gets half of it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    started = time.perf_counter()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    files = args.data or (data.fetch_reviews(args.cache), data.fetch_sources(args.cache))
    folder = args.model or data.fetch_model(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).to(device)
    classes, train_sets, held_out = {}, {}, {}
    for task, file in zip(RANKS, files, strict=True):
        examples = data.load_examples(file)
        classes[task] = sorted({example.label for example in examples})
        parts = (data.encode(part, classes[task], tokenizer) for part in data.split(examples))
        train_sets[task], held_out[task] = parts
        some = SERVED // 4 if args.quick else SERVED
        held_out[task] = held_out[task][:: max(1, len(held_out[task]) // some)]  # of every length
        print(f"{task}: {len(train_sets[task])} to train on, classes {classes[task]}")

    model = build(encoder, classes, args.lora_alpha, args.backend).to(device)
    mixed = [(task, example) for task in RANKS for example in held_out[task]]
    order = torch.randperm(len(mixed)).tolist()
    shuffled = [mixed[i] for i in order]

    def right(answers: list[Tensor], task: str) -> float:
        hits = [
            answer.argmax().item() == label
            for answer, (which, (_, label)) in zip(answers, shuffled, strict=True)
            if which == task
        ]
        return sum(hits) / len(hits)

    before = serve(model, shuffled, device)
    train(model, train_sets, args.steps, args.batch_size, args.lr, args.seed, device)
    answers = serve(model, shuffled, device)
    pack = next(m.pack for m in model.modules() if isinstance(m, fused_lora.MultiLoRALinear))
    print(f"one of {len(TARGETS) * encoder.config.num_hidden_layers} packs: {pack!r}")

    in_turn: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in RANKS:
            fused_lora.save_adapter(model.encoder, folder, name=task)  # PEFT reads it, too
            single = alone(folder, encoder, task, args.lora_alpha, args.backend)
            in_turn += serve_alone(model, single, task, held_out[task], device)
    expected = [in_turn[i] for i in order]
    pairs = list(zip(answers, expected, strict=True))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    equal = sum(a.argmax() == b.argmax() for a, b in pairs)
    for task in RANKS:
        print(
            f"{task}: held-out accuracy {right(before, task):.1%} -> {right(answers, task):.1%}, "
            f"single-adapter model {right(expected, task):.1%}"
        )
    print(
        f"served in mixed batches of {EVAL_BATCH}: {equal} of {len(pairs)} answers equal those of "
        f"the single-adapter models, largest difference of a logit {difference:.1e} (allowed "
        f"{TOLERANCE:.0e})"
    )
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if equal == len(pairs) and difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
