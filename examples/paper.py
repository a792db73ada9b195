"""Are the LoRA paper's findings (Hu et al., ICLR 2022) to be seen on a laptop? Trains a pretrained
encoder on film reviews in every way the paper compares, counts and times what it costs, and prints
which of the paper's claims agree, which differ, and which do not separate at this scale.

    python examples/paper.py --quick
    python examples/paper.py            goes on where an earlier call stopped

README.md beside this file says what is run, how claims are judged and what the files hold.
"""

import argparse
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import data
import paper_costs
import torch
from finetune import tqdm
from paper_costs import machine, results
from paper_findings import (
    OTHER_SEED,
    SAME_SEED,
    TWO_SEEDS,
    Finding,
    Overlap,
    accuracy_findings,
    cost_findings,
    overlap,
    subspace_findings,
    summarise,
    table,
)
from paper_runs import (
    ALPHA,
    MATRICES,
    Finished,
    Job,
    Method,
    Protocol,
    Result,
    digest_of,
    train,
)
from torch import nn
from transformers import AutoModel, AutoTokenizer

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BUDGET = [  # the columns of the paper's table 5: one number of parameters
    Method("lora", matrices, 8 // len(matrices))
    for matrices in (*((m,) for m in MATRICES), ("Wq", "Wk"), ("Wq", "Wv"), tuple(MATRICES))
]
RANKS = {r: Method("lora", ("Wq", "Wv"), r) for r in (1, 2, 4, 8, 64)}
FULL, BIAS, HEAD = Method("full"), Method("bias"), Method("head")
METHODS = list(dict.fromkeys([*BUDGET, *RANKS.values(), FULL, BIAS, HEAD]))
# All LoRA runs share one rate, chosen at both ends of the ranks so that it favours neither.
SWEEP = {  # kind -> the methods it is tried on, the rates
    "lora": ([RANKS[1], RANKS[64]], (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "full": ([FULL], (5e-5, 1e-4, 2e-4, 4e-4)),
    "bias": ([BIAS], (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "head": ([HEAD], (3e-3, 1e-2, 3e-2, 1e-1)),
}
SWEEP_SEED = 1000  # none of the seeds that are compared
FULL_STUDY = Protocol(steps=80, batch_size=12, max_tokens=32, seeds=5, held_out=2000)
QUICK_STUDY = Protocol(steps=12, batch_size=8, max_tokens=32, seeds=3, held_out=128)
STOPPED = 3  # exit status: time is up, call again


class OutOfTime(Exception):
    """--minutes are over; what is done is kept."""


class Study:
    """The encoder, the sentences, and the runs that are done."""

    def __init__(self, args: argparse.Namespace, protocol: Protocol):
        model_folder = args.model or data.fetch_model(args.cache)
        data_file = args.data or data.fetch_reviews(args.cache)
        self.protocol = protocol
        self.settings = {
            **asdict(protocol),
            "alpha": ALPHA,
            "model_sha256": digest_of(sorted(p for p in model_folder.iterdir() if p.is_file())),
            "data_sha256": digest_of([data_file]),
            "torch": torch.__version__,
        }
        of_a_run = {key: value for key, value in self.settings.items() if key != "seeds"}
        self.finished = Finished(args.cache / "paper", of_a_run)
        self.end = time.monotonic() + 60 * args.minutes
        examples = data.load_examples(data_file)
        classes = sorted({example.label for example in examples})
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        rest, test = data.split(examples)
        train_set, dev = split_dev(rest)
        self.sets = {
            part: data.encode(sentences, classes, tokenizer, protocol.max_tokens)
            for part, sentences in (("train", train_set), ("dev", dev), ("test", test))
        }
        for part in ("dev", "test"):  # sorted by length: every n-th is of every length
            every = math.ceil(len(self.sets[part]) / protocol.held_out)
            self.sets[part] = self.sets[part][::every]
        self.classes = len(classes)
        self.encoder: nn.Module = AutoModel.from_pretrained(model_folder, local_files_only=True)
        self.encoder.pooler = None  # the head reads the mean of the token states

    def run(self, what: str, jobs: list[Job]) -> list[Result]:
        """The results of these jobs; those not done yet are done now and kept one by one."""
        todo = [job for job in jobs if self.finished.result(job) is None]
        total = len(todo) * self.protocol.steps
        interval = 0.1 if sys.stderr.isatty() else 30.0  # a log needs no animation
        bar = tqdm(total=total, unit="step", mininterval=interval) if tqdm and todo else None
        for number, job in enumerate(todo, start=1):
            if time.monotonic() > self.end:
                raise OutOfTime
            name = f"{what} {number}/{len(todo)}, {job.method}, seed {job.seed}"
            if bar is not None:
                bar.set_description_str(name, refresh=False)
            else:
                print(name, flush=True)
            model, result = train(
                job,
                self.protocol,
                self.encoder,
                self.classes,
                self.sets,
                after_step=bar.update if bar is not None else lambda: None,
            )
            self.finished.keep(job, result, model)
        if bar is not None:
            bar.close()
        return [self.finished.result(job) for job in jobs]

    def rates(self) -> dict[str, dict[str, Any]]:
        """The learning rate of each kind of method: the one with the smallest loss on the dev set,
        after as many steps as the compared runs take."""
        jobs = {
            (kind, rate): [Job(method, SWEEP_SEED, rate, "dev") for method in methods]
            for kind, (methods, rates) in SWEEP.items()
            for rate in rates
        }
        self.run("choosing rates", [job for several in jobs.values() for job in several])
        found: dict[str, dict[str, Any]] = {}
        for kind, (methods, rates) in SWEEP.items():
            losses = {
                rate: [self.finished.result(job).loss for job in jobs[kind, rate]] for rate in rates
            }
            best = min(rates, key=lambda rate: statistics.mean(losses[rate]))
            found[kind] = {
                "dev_loss": {
                    str(method): {f"{rate:g}": round(losses[rate][place], 4) for rate in rates}
                    for place, method in enumerate(methods)
                },
                "chosen": best,
                "at_the_edge": best in (rates[0], rates[-1]),
            }
        return found

    def overlaps(self, rate: float) -> dict[str, dict[str, Overlap]]:
        """By pair of runs, then by matrix. Runs of one seed saw the same batches and began with the
        same head, which alone makes them alike; therefore r=8 meets r=64 of its own and of the
        other seeds, apart."""
        seeds = range(self.protocol.seeds)
        small, large = (
            [self.finished.factors(Job(RANKS[r], seed, rate, "test")) for seed in seeds]
            for r in (8, 64)
        )
        compared = {
            SAME_SEED: {(a, a): (small[a], large[a]) for a in seeds},
            OTHER_SEED: {(a, b): (small[a], large[b]) for a, b in permutations(seeds, 2)},
            TWO_SEEDS: {(a, b): (large[a], large[b]) for a, b in combinations(seeds, 2)},
        }
        return {
            what: {matrix: overlap(matrix, MATRICES[matrix], runs) for matrix in RANKS[8].matrices}
            for what, runs in compared.items()
        }

    def costs(self, rate: float, seconds: float) -> dict[str, Any]:
        method = RANKS[8]
        adapters = [self.finished.factors(Job(method, seed, rate, "test")) for seed in (0, 1)]

        def adapted(which: int = 0) -> nn.Module:
            return paper_costs.adapted(self.encoder, method, adapters[which])

        batch = self.sets["train"][:: len(self.sets["train"]) // self.protocol.batch_size]
        print("measuring latency, switching and memory ...", flush=True)
        return {
            "latency": paper_costs.latency(self.encoder, adapted, seconds),
            "switching": paper_costs.switching(self.encoder, [adapted(0), adapted(1)]),
            "memory": paper_costs.memory(
                self.encoder, self.classes, [FULL, RANKS[64], RANKS[8], RANKS[1], BIAS, HEAD], batch
            ),
        }


def split_dev(examples: list[data.Example]) -> tuple[list[data.Example], list[data.Example]]:
    """(train, dev), about fifteen to one, by a hash of the text, as `data.split` holds out."""
    train_set, dev = [], []
    for example in examples:
        digest = hashlib.sha256(example.text.encode()).digest()
        (dev if digest[1] % 16 == 0 else train_set).append(example)
    return train_set, dev


def described(one: Overlap) -> dict[str, Any]:
    """What the result file keeps of the grids: means over the pairs, layer by layer."""
    return {
        f"top {i}": {
            "layers": [round(value, 4) for value in one.grids[:, :, i - 1, i - 1].mean(0).tolist()],
            "mean": round(one.shared(i), 4),
            "chance": i / one.width,
        }
        for i in (1, 2, 4, 8)
    }


def draw(
    stem: Path,
    summary: dict[str, dict[str, Any]],
    overlaps: dict[str, dict[str, Overlap]],
    costs: dict[str, Any],
) -> None:
    try:
        import paper_figures
    except ImportError:
        print("pictures: n/a (matplotlib is not installed)")
        return
    columns = [str(method) for method in BUDGET]
    swept = {r: str(method) for r, method in RANKS.items()}
    paper_figures.accuracy(summary, columns, swept, Path(f"{stem}-accuracy.png"))
    title = "similarity of the top i directions of A at r={} and the top j at r=64"
    paper_figures.heat_maps(
        {
            f"{matrix}, {'same' if what == SAME_SEED else 'other'} seed": one
            for what in (SAME_SEED, OTHER_SEED)
            for matrix, one in overlaps[what].items()
        },
        title.format(8),
        Path(f"{stem}-ranks.png"),
    )
    paper_figures.heat_maps(overlaps[TWO_SEEDS], title.format(64), Path(f"{stem}-seeds.png"))
    paper_figures.costs(costs, Path(f"{stem}-costs.png"))
    print(f"written: {stem}-{{accuracy,ranks,seeds,costs}}.png")


def report(study: Study, args: argparse.Namespace) -> int:
    """Run what is missing, judge, print, write; 1 if a base weight was not restored exactly."""
    rates = study.rates()
    jobs = [
        Job(method, seed, rates[method.kind]["chosen"], "test")
        for seed in range(study.protocol.seeds)
        for method in METHODS
    ]
    runs: dict[str, list[Result]] = {}
    for result in study.run("comparing", jobs):
        runs.setdefault(result.method, []).append(result)
    rate = rates["lora"]["chosen"]
    overlaps = study.overlaps(rate)
    costs = study.costs(rate, seconds=5 if args.quick else 30)
    findings: list[Finding] = [
        *accuracy_findings(runs, len(study.sets["test"])),
        *subspace_findings(overlaps),
        *cost_findings(costs),
    ]
    summary = summarise(runs)
    print(f"\n{table(summary)}\n")
    for kind, row in rates.items():
        edge = ", the edge of what was tried" if row["at_the_edge"] else ""
        print(f"learning rate of {kind}: {row['chosen']:g}{edge}; dev losses {row['dev_loss']}")
    print("\n" + "\n".join(map(str, findings)))
    meta = machine.describe(torch.device("cpu"), "float32")
    meta["command"] = "python examples/paper.py" + (" --quick" if args.quick else "")
    name = f"paper-{args.model.name if args.model else 'minilm'}{'-quick' if args.quick else ''}"
    stem = args.output / f"{name}-{meta['date']}"
    sizes = {part: len(sentences) for part, sentences in study.sets.items()}
    document = {
        "meta": meta,
        "settings": study.settings,
        "sentences": sizes,
        "rates": rates,
        "methods": summary,
        "findings": [asdict(finding) for finding in findings],
        "overlaps": {
            what: {matrix: described(one) for matrix, one in by_matrix.items()}
            for what, by_matrix in overlaps.items()
        },
        "costs": costs,
        "runs": [asdict(run) for several in runs.values() for run in several],
    }
    results.write_json(Path(f"{stem}.json"), document)
    print(f"\nwritten: {stem}.json")
    draw(stem, summary, overlaps, costs)
    return 0 if costs["switching"]["base_restored"] else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in a few minutes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time, go on later")
    for name, field in vars(FULL_STUDY).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {field}")
    parser.add_argument("--model", type=Path, help="transformers folder (default: MiniLM-L6)")
    parser.add_argument("--data", type=Path, help="file of label<TAB>text (default: film reviews)")
    parser.add_argument(
        "--cache", type=Path, default=data.default_cache(), help="downloads and runs go here"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 3:
        parser.error("--seeds must be at least 3: of fewer, pairs have no standard error")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    standard = vars(QUICK_STUDY if args.quick else FULL_STUDY)
    given = {name: getattr(args, name) for name in standard if getattr(args, name) is not None}
    study = Study(args, Protocol(**{**standard, **given}))
    try:
        return report(study, args)
    except OutOfTime:
        print(f"\nstopped after --minutes {args.minutes:g}: the same call goes on from here")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
