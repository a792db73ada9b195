"""The floor: flops and compulsory bytes of a linear layer with and without its adapter.

Nothing can run below `max(flops / peak, bytes / bandwidth)` of each phase; `% of floor` in the
latency table is that bound over the measured time. The peaks are measured on the machine itself
(machine.py), never taken from a data sheet. Run it to print the floor of given shapes:

    python benchmarks/roofline.py --shapes 8192x4096x4096 --ranks 8,16,64,128
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from results import PLAIN, Case

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.5 + 4 / 64  # of an element of W: its bits, and its share of a block's fp32 scale


@dataclass(frozen=True)
class Work:
    """What one phase must at least do: multiply-adds counted as two flops, bytes moved once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """Measured limits of the machine: matrix products in TFLOP/s, copies (read + write) in GB/s."""

    gemm_tflops: float
    copy_gbs: float


def phases(case: Case, adapter: bool) -> tuple[Work, ...]:
    """Forward, and for fwd+bwd the backward: two phases, because dY depends on y.

    Without adapter: y = x W^T; dX = dY W (W is frozen). With adapter also S = x A^T, y += S B^T;
    dS = dY B, dX += dS A, dA = dS^T x, dB = dY^T S. Compulsory traffic of the backward: read dY
    and W, write dX; the adapter adds x (for dA and for S), A, B and the two gradients. S itself
    never has to leave the chip.
    """
    M, K, N, r = case.M, case.K, case.N, case.r
    size = ITEMSIZE[case.dtype]
    W = round(K * N * (size if case.base == PLAIN else NF4_BYTES))  # bytes
    rank_flops, rank_elements = (2 * M * r * (K + N), r * (K + N)) if adapter else (0, 0)
    forward = Work(
        flops=2 * M * K * N + rank_flops,
        bytes=W + size * (M * K + M * N + rank_elements),
    )
    if case.mode == "fwd":
        return (forward,)
    backward = Work(
        flops=2 * M * K * N + 2 * rank_flops,
        bytes=W + size * (M * N + M * K + (M * K if adapter else 0) + 2 * rank_elements),
    )
    return forward, backward


def total_flops(case: Case, adapter: bool) -> int:
    return sum(work.flops for work in phases(case, adapter))


def floor_us(case: Case, adapter: bool, peaks: Peaks) -> float:
    """Lower bound of the case's time in microseconds on a machine with these peaks."""
    return sum(
        max(work.flops / (peaks.gemm_tflops * 1e6), work.bytes / (peaks.copy_gbs * 1e3))
        for work in phases(case, adapter)
    )


def adapter_flops_share(case: Case) -> float:
    """Extra flops over the layer without adapter: r/N + r/K forward, 1.5 times that with backward.

    No implementation can undercut this where the layer is bound by compute.
    """
    return total_flops(case, adapter=True) / total_flops(case, adapter=False) - 1


def floor_table(cases: list[Case], peaks: Peaks) -> str:
    """Plain-text table, one line a case."""
    lines = [
        f"{'case':44s} {'GFLOP':>9s} {'MiB':>8s} {'merged us':>10s} {'fused us':>10s}"
        f" {'overhead':>9s} {'flops':>7s}"
    ]
    for case in cases:
        work = phases(case, adapter=True)
        merged, fused = (floor_us(case, adapter, peaks) for adapter in (False, True))
        lines.append(
            f"{case!s:44s} {sum(w.flops for w in work) / 1e9:9.2f}"
            f" {sum(w.bytes for w in work) / 2**20:8.1f} {merged:10.1f} {fused:10.1f}"
            f" {fused / merged - 1:+9.2%} {adapter_flops_share(case):+7.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    import machine
    from cases import add_case_options, chosen_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_options(parser)
    device = machine.benchmark_device()
    plan = chosen_cases(parser.parse_args(), device.type)
    cases = plan.core + plan.rest
    peaks = machine.measure_peaks(device, cases[0].dtype)
    print(f"{machine.device_name(device)}: {machine.peaks_line(peaks)}")
    print(floor_table(cases, peaks))
    print("floor of the time: merged, fused, overhead of fused; flops: adapter's share (r/N + r/K)")


if __name__ == "__main__":
    main()
