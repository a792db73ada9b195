"""One training run of examples/paper.py: what is trained, how, and what is kept of it on disk."""

import copy
import hashlib
import json
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import safetensors.torch
import torch
import torch.nn.functional as F
from finetune import EVAL_BATCH, HEAD_LR, Classifier
from torch import Tensor, nn

import fused_lora
from fused_lora.atomic import write_directory

MATRICES = {"Wq": "query", "Wk": "key", "Wv": "value", "Wo": "attention.output.dense"}
# The update is scaled by ALPHA / sqrt(r) (rsLoRA): with ALPHA / r it would shrink as r grows, with
# a constant it would grow, and ranks or budgets would be compared by that alone.
ALPHA = 4.0
CPU = torch.device("cpu")
RUN_FILE, FACTORS_FILE = "run.json", "factors.safetensors"


@dataclass(frozen=True)
class Method:
    """What trains beside the head: LoRA on some matrices of every layer ("lora"), everything
    ("full"), every bias ("bias") or nothing ("head")."""

    kind: str
    matrices: tuple[str, ...] = ()
    r: int = 0

    def __str__(self) -> str:
        if self.kind == "lora":
            return f"{'+'.join(self.matrices)} r={self.r}"
        return {"full": "full fine-tuning", "bias": "biases", "head": "head"}[self.kind]


@dataclass(frozen=True)
class Job:
    """One run: `rate` is the learning rate (of the head, if nothing else trains); `part` is the set
    the result is measured on, "dev" to choose a rate or "test"."""

    method: Method
    seed: int
    rate: float
    part: str

    @property
    def folder(self) -> str:
        name = str(self.method).replace(" ", "-").replace("+", "-")
        return f"{self.part}-{name}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """What all runs of a study have in common."""

    steps: int
    batch_size: int
    max_tokens: int
    seeds: int
    held_out: int  # at most so many sentences of each of dev and test, of every length


@dataclass(frozen=True)
class Result:
    """What one run leaves behind."""

    method: str
    seed: int
    rate: float
    part: str
    trainable: int  # parameters, the head's among them
    checkpoint_bytes: int  # a safetensors file of what was trained
    first_loss: float
    last_loss: float  # mean of the last ten steps
    loss: float  # on `part`, as the accuracy
    accuracy: float
    right: str  # one bit for each sentence of `part`, in hexadecimal
    seconds: float

    def bits(self, sentences: int) -> list[int]:
        return [int(bit) for bit in f"{int(self.right, 16):0{sentences}b}"]


def build(method: Method, encoder: nn.Module, classes: int, seed: int) -> Classifier:
    """A copy of the encoder with a head, `method`'s parameters set to train. Heads depend on the
    seed alone, adapters on seed and method: else r=8 would begin inside r=64."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(encoder), classes, torch.float32)
    model.encoder.requires_grad_(method.kind == "full")
    if method.kind == "lora":
        torch.manual_seed(zlib.crc32(f"{method} {seed}".encode()))
        add_adapters(model.encoder, method)
    elif method.kind == "bias":
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))
    return model.eval()  # the encoder's dropout off


def add_adapters(encoder: nn.Module, method: Method) -> None:
    fused_lora.apply_lora(
        encoder,
        r=method.r,
        lora_alpha=ALPHA,
        use_rslora=True,
        target_modules=[MATRICES[matrix] for matrix in method.matrices],
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the task holds."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(model: Classifier, rate: float) -> torch.optim.Optimizer:
    inner = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [{"params": model.head.parameters(), "lr": HEAD_LR if inner else rate}]
    groups += [{"params": inner, "lr": rate}] if inner else []
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def loss_of(model: Classifier, batch: data.Encoded) -> Tensor:
    ids, mask, labels = data.collate(batch, CPU)
    return F.cross_entropy(model(ids, mask), labels)


@torch.no_grad()
def evaluate(model: Classifier, sentences: data.Encoded) -> tuple[float, str]:
    """The mean loss, and of every sentence whether the answer is right, as `Result.right`."""
    total, bits = 0.0, ""
    for start in range(0, len(sentences), EVAL_BATCH):
        ids, mask, labels = data.collate(sentences[start : start + EVAL_BATCH], CPU)
        logits = model(ids, mask)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        bits += "".join(str(int(right)) for right in logits.argmax(-1) == labels)
    return total / len(sentences), f"{int(bits, 2):x}"


def train(
    job: Job,
    protocol: Protocol,
    encoder: nn.Module,
    classes: int,
    sets: dict[str, data.Encoded],
    after_step: Callable[[], None] = lambda: None,
) -> tuple[Classifier, Result]:
    """Train one model with AdamW, rates rising over the first tenth of the steps, then falling
    linearly to zero. Runs of one seed see the same batches."""
    start = time.perf_counter()
    model = build(job.method, encoder, classes, job.seed)
    optimizer = optimizer_of(model, job.rate)
    steps, rising = protocol.steps, max(1, protocol.steps // 10)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / steps)
    )
    losses = []
    for batch in data.schedule(len(sets["train"]), steps, protocol.batch_size, job.seed):
        loss = loss_of(model, [sets["train"][index] for index in batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        losses.append(loss.item())
        after_step()
    loss, right = evaluate(model, sets[job.part])
    parameters = trained(model)
    result = Result(
        method=str(job.method),
        seed=job.seed,
        rate=job.rate,
        part=job.part,
        trainable=sum(parameter.numel() for parameter in parameters.values()),
        checkpoint_bytes=len(safetensors.torch.save(parameters)),
        first_loss=losses[0],
        last_loss=statistics.mean(losses[-10:]),
        loss=loss,
        accuracy=int(right, 16).bit_count() / len(sets[job.part]),
        right=right,
        seconds=round(time.perf_counter() - start, 2),
    )
    return model, result


class Finished:
    """The runs that are done, one folder each, written all at once, below a folder named by a hash
    of the settings: what was made with other settings, data or weights is never found."""

    def __init__(self, cache: Path, settings: dict):
        text = json.dumps(settings, sort_keys=True)
        self.folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        write_directory(self.folder, {"settings.json": text.encode()})

    def result(self, job: Job) -> Result | None:
        path = self.folder / job.folder / RUN_FILE
        return Result(**json.loads(path.read_text())) if path.exists() else None

    def factors(self, job: Job) -> dict[str, Tensor]:
        """lora_A and lora_B of every layer, keys as in `fused_lora.lora_state_dict`."""
        return safetensors.torch.load_file(self.folder / job.folder / FACTORS_FILE)

    def keep(self, job: Job, result: Result, model: Classifier) -> None:
        files = {RUN_FILE: json.dumps(asdict(result)).encode()}
        if job.method.kind == "lora" and job.part == "test":
            state = fused_lora.lora_state_dict(model.encoder)
            files[FACTORS_FILE] = safetensors.torch.save(state)
        write_directory(self.folder / job.folder, files)


def digest_of(files: list[Path]) -> str:
    """SHA-256 over the contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
