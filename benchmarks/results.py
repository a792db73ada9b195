"""The result file: what a row holds, reading, atomic writing. Standard library only.

The fields and their units are described in benchmarks/README.md; the schema is stable.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "base"
MERGED = "merged"
MERGED_AGAIN = "merged (A/A)"
FUSED = "fused"
FUSED_TUNED = "fused (tuned)"
FUSED_DELTA = "fused (delta)"
PLAIN = "plain"
BASELINES = (  # what a user could train with instead of the fused layer
    "eager3",
    "addmm",
    "addmm_",
    "torch.compile",
    "torch.compile (max-autotune)",
    "peft",
    "peft (fp32 adapters)",
)
PROVIDERS = (BASE, MERGED, MERGED_AGAIN, *BASELINES, FUSED, FUSED_TUNED, FUSED_DELTA)


@dataclass(frozen=True)
class Case:
    """One group of rows: a layer `[M, K] -> [M, N]` with rank r, a dtype and a mode."""

    mode: str  # "fwd" or "fwd+bwd"
    M: int
    K: int
    N: int
    r: int
    dtype: str
    base: str = PLAIN  # or how the frozen weight is quantised

    def __str__(self) -> str:
        base = "" if self.base == PLAIN else f" {self.base} base"
        return f"{self.mode} {self.M}x{self.K}x{self.N} r={self.r} {self.dtype}{base}"


@dataclass(frozen=True)
class Row:
    """One provider on one case. `ok`: True accepted and timed, False wrong, None not run."""

    mode: str
    M: int
    K: int
    N: int
    r: int
    dtype: str
    provider: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    vs_merged: float | None = None
    noise: float | None = None
    host_p50_us: float | None = None
    tflops: float | None = None
    pct_floor: float | None = None
    extra_mib: float | None = None
    launches: int | None = None
    rel_l2: float | None = None
    rel_l2_vs_eager: float | None = None
    ok: bool | None = None
    note: str | None = None
    base: str = PLAIN

    @property
    def case(self) -> Case:
        return Case(self.mode, self.M, self.K, self.N, self.r, self.dtype, self.base)


def by_case(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Rows grouped by case and then by provider, in the order they were measured."""
    groups: dict[Case, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.case, {})[row.provider] = row
    return groups


def fastest_baseline(group: dict[str, Row]) -> Row | None:
    """The fastest accepted trainable baseline of one case, by p50_us."""
    timed = [group[name] for name in BASELINES if name in group and group[name].p50_us is not None]
    return min(timed, key=lambda row: row.p50_us, default=None)


def losses(rows: list[Row]) -> list[tuple[Row, Row]]:
    """(fused, fastest baseline) for every case where fused is slower beyond the A/A noise."""
    lost = []
    for group in by_case(rows).values():
        fused, best = group.get(FUSED), fastest_baseline(group)
        if fused is None or fused.p50_us is None or best is None:
            continue
        if fused.p50_us / best.p50_us - 1 > (fused.noise or 0.0):
            lost.append((fused, best))
    return lost


def save(path: Path, meta: dict[str, Any], rows: list[Any]) -> None:
    write_json(path, {"meta": meta, "rows": [dataclasses.asdict(row) for row in rows]})


def write_json(path: Path, document: Any) -> None:
    """Write the file so that a reader, or an interruption, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read a file that `save` wrote.

    Raises:
        ValueError: the file is no result file of this schema.
    """
    with open(path) as file:
        document = json.load(file)
    try:
        return document["meta"], [Row(**row) for row in document["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result file of this benchmark ({error}): expected "
            '{"meta": ..., "rows": [...]} with the fields of benchmarks/README.md'
        ) from error
