"""The instruction set of pipeline programs, as data.

    compute        FORWARD(stage, microbatch)   BACKWARD(stage, microbatch)
    communication  SEND(edge, microbatch)       RECEIVE(edge, microbatch)
    the step       REDUCE                       STEP

A program is one list of instructions a pipeline rank. Stage i runs on pipeline rank i, and edges join neighbours;
activations flow up, gradients flow down.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "reduce"
    """Sum gradients over data-parallel ranks and over copies of shared parameters."""
    STEP = "step"
    """The optimizer's step."""


class EdgeKind(StrEnum):
    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Edge:
    """What flows from one stage to the next (activations) or to the one before (gradients)."""

    kind: EdgeKind
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """`edge` is set for SEND and RECEIVE, `microbatch` for all but REDUCE and STEP."""

    op: Op
    stage: int
    microbatch: int | None = None
    edge: Edge | None = None

    def __str__(self) -> str:
        where = self.stage if self.edge is None else f"{self.edge.kind} {self.edge.source}->{self.edge.target}"
        return f"{self.op}({where})" if self.microbatch is None else f"{self.op}({where}, microbatch {self.microbatch})"


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions by pipeline rank."""

    name: str
    num_microbatches: int
    ranks: tuple[tuple[Instruction, ...], ...]
