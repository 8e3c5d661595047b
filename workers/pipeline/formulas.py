"""What the literature says of schedules, in closed form: idle time, bubble, memory. Pure.

`p` ranks, `m` microbatches, `v` chunks a rank; F, I, W the times of a microbatch's forward and of its gradients of
inputs and of weights, on one rank, over all of its chunks. Messages take no time, and nothing is recomputed.

    schedule      idle on each rank      peak of live activations on rank s           holds if
    gpipe         (p-1)(F+I+W)           m                                            always
    1f1b          (p-1)(F+I+W)           min(p-s, m)                                  always
    interleaved   (p-1)(F+I+W)/v         min(vm, (v-1)p + 2(p-1-s) + 1), in chunks    p divides m
    zb-h1         (p-1)(F+I-W)           min(p, m)                                    m >= p, W <= F, W <= I
    forward       (p-1)F, or 0 by itself none                                         always

Sources: arXiv 1811.06965 (GPipe), 2006.09503 (1F1B), 2104.04473 (interleaved), 2401.10241 (ZB-H1; the paper assumes
F = I = W, and simulation shows the wider range). Of the two definitions of idle time (`simulate.Figures`) both give the
same, but for `forward`: there no rank pauses once it has begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from .schedules import Kind
from .simulate import Times


@dataclass(frozen=True, slots=True)
class Formulas:
    """Of one schedule, with numbers put in: the names are those of `simulate.Figures`."""

    makespan: float
    idle: float
    idle_own: float
    bubble: float
    bubble_own: float
    peak: tuple[int, ...]
    """Live activations by rank, counted as `simulate.Peaks` does."""
    unmet: str
    """The condition under which they hold, if it is not met; else empty. Peaks are upper bounds even then."""


def formulas(kind: Kind, num_ranks: int, num_microbatches: int, num_chunks: int, times: Times) -> Formulas:
    """The table above. `times.communication` is left out of account."""
    p, m, v = num_ranks, num_microbatches, num_chunks
    busy, unmet = m * times.microbatch, ""
    match kind:
        case Kind.GPIPE:
            idle, peak = (p - 1) * times.microbatch, [m] * p
        case Kind.ONE_F_ONE_B:
            idle, peak = (p - 1) * times.microbatch, [min(p - s, m) for s in range(p)]
        case Kind.INTERLEAVED:
            idle = (p - 1) * times.microbatch / v
            peak = [min(v * m, (v - 1) * p + 2 * (p - 1 - s) + 1) for s in range(p)]
            unmet = "the number of ranks divides that of microbatches" if m % p else ""
        case Kind.ZB_H1:
            idle = (p - 1) * (times.forward + times.input_gradient - times.weight_gradient)
            peak = [min(p, m)] * p
            if m < p:
                unmet = "there are as many microbatches as ranks, or more"
            elif times.weight_gradient > min(times.forward, times.input_gradient):
                unmet = "gradients of weights take no longer than forwards, and than gradients of inputs"
        case Kind.FORWARD:
            idle, peak, busy = (p - 1) * times.forward, [0] * p, m * times.forward
        case _:
            assert_never(kind)
    own = 0.0 if kind is Kind.FORWARD else idle
    return Formulas(busy + idle, idle, own, idle / (busy + idle), own / (busy + own), tuple(peak), unmet)
