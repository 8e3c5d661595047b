"""The runner: executes one rank's instructions of any program, training and inference alike.

It knows stages, channels and autograd; it knows no schedule and no algorithm. Sequences are packed, and microbatches
differ in length: every rank knows the lengths from the request, so no shapes travel.

Guarantees: a training program leaves in `.grad` the gradient of `sum over microbatches of finish(...)` on every stage;
buffers are freed as their last reader is done; sends and receives overlap with compute (a RECEIVE begins one, and what
uses the message waits for it) and are all complete on return.

Not yet: chunks, apart gradients of inputs and weights, recomputation; an instruction of these is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...api.errors import ProgramError
from ..data.microbatch import Microbatch
from ..models.stage import Stage
from ..parallel.groups import Group, Receiving, Sending
from .instructions import Edge, EdgeKind, Instruction, Op

Finish = Callable[[Stage, Tensor, Microbatch], Tensor | None]
"""What the last stage does with a microbatch's hidden states `[1, T, H]`; in training it returns the scalar loss."""


@dataclass(slots=True)
class _Live:
    """What a microbatch leaves between its instructions."""

    arriving: Receiving | None = None
    """Hidden states from the stage before, or the gradient of `output` from the next, until they are used."""
    received: Tensor | None = None
    """Hidden states from the stage before, `[1, T, H]`, a leaf that collects its gradient."""
    output: Tensor | None = None
    """Hidden states for the next stage, or the scalar loss on the last."""

    def arrived(self) -> Tensor | None:
        """What was received since this was asked last, once it is there; None if nothing was."""
        receiving, self.arriving = self.arriving, None
        if receiving is None:
            return None
        receiving.wait()
        return receiving.tensor


@dataclass(slots=True)
class Runner:
    """Runs programs on one stage. The two groups join the stages of one replica by index; None for one stage."""

    stage: Stage
    activations: Group | None
    gradients: Group | None
    device: torch.device
    dtype: torch.dtype
    _live: dict[int, _Live] = field(default_factory=dict)
    _sendings: list[Sending] = field(default_factory=list)

    def run(
        self,
        instructions: Sequence[Instruction],
        microbatches: Sequence[Microbatch],
        finish: Finish,
        reduce: Callable[[], None] | None = None,
        step: Callable[[], None] | None = None,
    ) -> None:
        """Executes the instructions in order. `reduce` and `step` are called where a training program says so."""
        training = step is not None
        try:
            with torch.set_grad_enabled(training):
                for instruction in instructions:
                    self._execute(instruction, microbatches, finish, reduce, step)
            for sending in self._sendings:
                sending.wait()
            assert not self._live, f"buffers of microbatches {sorted(self._live)} were not freed"
        finally:
            self._live.clear()
            self._sendings.clear()

    def _execute(
        self,
        instruction: Instruction,
        microbatches: Sequence[Microbatch],
        finish: Finish,
        reduce: Callable[[], None] | None,
        step: Callable[[], None] | None,
    ) -> None:
        index = instruction.microbatch
        match instruction.op:
            case Op.FORWARD:
                assert index is not None, "FORWARD names a microbatch"
                self._forward(index, microbatches[index], finish, training=step is not None)
            case Op.BACKWARD:
                assert index is not None, "BACKWARD names a microbatch"
                self._backward(index)
            case Op.SEND:
                self._send(instruction, training=step is not None)
            case Op.RECEIVE:
                assert index is not None, "RECEIVE names a microbatch"
                self._receive(instruction, microbatches[index])
            case Op.REDUCE:
                assert reduce is not None, "a training program needs `reduce`"
                reduce()
            case Op.STEP:
                assert step is not None, "a training program needs `step`"
                step()
            case _:
                raise ProgramError(
                    f"{instruction} is beyond this runner: it runs forwards and whole backwards of one stage"
                )

    def _forward(self, index: int, microbatch: Microbatch, finish: Finish, training: bool) -> None:
        live = self._live.setdefault(index, _Live())
        live.received = live.arrived()
        if live.received is not None and training:
            live.received.requires_grad_()  # without it only the last stage would train
        hidden = self.stage(microbatch.tokens, microbatch.packed, live.received)
        live.output = finish(self.stage, hidden, microbatch) if self.stage.is_last else hidden
        if not training and self.stage.is_last:
            del self._live[index]

    def _backward(self, index: int) -> None:
        live = self._live[index]
        assert live.output is not None, "a backward follows its forward"
        torch.autograd.backward(live.output, live.arrived())
        live.output = None
        if self.stage.is_first:
            del self._live[index]

    def _send(self, instruction: Instruction, training: bool) -> None:
        edge, index = instruction.edge, instruction.microbatch
        assert edge is not None, "SEND names an edge"
        assert index is not None, "SEND names a microbatch"
        live = self._live[index]
        if edge.kind is EdgeKind.ACTIVATION:
            assert live.output is not None, "an activation is sent after its forward"
            tensor = live.output.detach()
            if not training:
                del self._live[index]
        else:
            assert live.received is not None, "a gradient goes back to where the activation came from"
            assert live.received.grad is not None, "the backward has filled the gradient"
            tensor = live.received.grad
            del self._live[index]
        self._sendings = [sending for sending in self._sendings if not sending.is_done()]
        self._sendings.append(self._channel(edge).send(tensor.contiguous(), edge.target, tag=_tag(instruction)))

    def _receive(self, instruction: Instruction, microbatch: Microbatch) -> None:
        edge, index = instruction.edge, instruction.microbatch
        assert edge is not None, "RECEIVE names an edge"
        assert index is not None, "RECEIVE names a microbatch"
        tensor = torch.empty(
            1, microbatch.num_tokens, self.stage.hidden_size, dtype=self.dtype, device=self.device
        )  # [1, T, H]
        live = self._live.setdefault(index, _Live())
        assert live.arriving is None, "a message is used before the next is received for its microbatch"
        live.arriving = self._channel(edge).expect(tensor, edge.source, tag=_tag(instruction))

    def _channel(self, edge: Edge) -> Group:
        group = self.activations if edge.kind is EdgeKind.ACTIVATION else self.gradients
        assert group is not None, "a program with communication runs on several stages"
        return group


def _tag(instruction: Instruction) -> int:
    """Of a message, the same on both ends."""
    assert instruction.microbatch is not None, "communication names a microbatch"
    return instruction.microbatch
