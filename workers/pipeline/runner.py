"""The runner: executes one rank's instructions of any program, training and inference alike.

It knows stages, channels and autograd; it knows no schedule and no algorithm. Sequences are packed, and microbatches
differ in length: every rank knows the lengths from the request, so no shapes travel.

    inbox     what has come for a stage (or comes: a RECEIVE only begins), until the instruction that uses it
    passes    what a stage keeps of a microbatch, from FORWARD to BACKWARD or WEIGHT_GRADIENT
    outbox    what is made for another rank, until its SEND; what is for a stage of this rank goes to the inbox at once

Guarantees: a training program leaves in `.grad` the gradient of `sum over microbatches of finish(...)` on every stage;
random numbers (dropout) depend on the seed, the stage and the microbatch alone, so schedules agree and a recomputation
repeats its forward; ranks that would not run the same program on microbatches of the same lengths all refuse it; all
buffers are freed and all messages complete on return. An error says the instruction. After one, what other ranks wait
for never comes: they are freed as groups are left (`Group.leave`), and the next program wants new groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from ...api.errors import ProgramError, RunError, TrainmasterError
from ..data.microbatch import Microbatch
from ..models.stage import Stage
from ..parallel.groups import Group, Receiving, Sending
from ..seeding import seed_of
from .apart import Deferred, deferring
from .comparing import compare
from .instructions import Edge, EdgeKind, Instruction, Op, Program
from .timing import Clock

Finish = Callable[[Stage, Tensor, Microbatch], Tensor | None]
"""What the last stage does with a microbatch's hidden states `[1, T, H]`; in training it returns the scalar loss."""
_Key = tuple[int, int]
"""Stage or edge, and microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training program wants besides microbatches."""

    seed: str
    """Of random numbers, with stage and microbatch."""
    reduce: Callable[[int], None]
    """Called for each stage, in the order of the program, once its gradients are complete."""
    step: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs programs on the stages of one rank. The two groups join the ranks of one replica; None for one rank."""

    stages: Sequence[Stage]
    activations: Group | None
    gradients: Group | None
    device: torch.device
    dtype: torch.dtype

    def run(
        self,
        program: Program,
        microbatches: Sequence[Microbatch],
        finish: Finish,
        training: Training | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Executes this rank's instructions in order. All ranks of the pipeline call this at once.

        Raises ProgramError, on all of them, if they differ in program or lengths; RunError for anything that breaks in
        an instruction, but errors of ours as they are, with a note.
        """
        assert program.num_microbatches == len(microbatches), (
            f"{program.name} is for {program.num_microbatches} microbatches, not {len(microbatches)}"
        )
        rank = 0
        if self.activations is not None:
            rank = self.activations.index
            compare(program, [each.num_tokens for each in microbatches], self.activations, self.device)
        own = [stage.id for stage in program.topology.stages_of(rank)]
        assert own == [stage.index for stage in self.stages], f"rank {rank} holds other stages than {own}"
        run = _Run(self, program, rank, microbatches, finish, training, clock or Clock(None))
        with torch.set_grad_enabled(training is not None):
            run.execute()


class _Pass:
    """What a stage keeps of a microbatch."""

    __slots__ = ("deferred", "output", "received")

    def __init__(self, received: Tensor | None) -> None:
        self.received = received
        """Hidden states from the stage before, `[1, T, H]`, a leaf that collects its gradient; None on the first."""
        self.output: Tensor | None = None
        """Hidden states for the next stage, or the scalar loss on the last; None until they can be led back from."""
        self.deferred: Deferred | None = None
        """Gradients of weights that are still to be made."""


class _Run:
    """One program, once."""

    def __init__(
        self,
        runner: Runner,
        program: Program,
        rank: int,
        microbatches: Sequence[Microbatch],
        finish: Finish,
        training: Training | None,
        clock: Clock,
    ) -> None:
        self._runner, self._program, self._rank = runner, program, rank
        self._microbatches, self._finish, self._training, self._clock = microbatches, finish, training, clock
        self._instructions, self._topology = program.ranks[rank], program.topology
        self._stages = {stage.index: stage for stage in runner.stages}
        self._recomputed = {_key(each) for each in self._instructions if each.op is Op.RECOMPUTE}
        self._split = {_key(each) for each in self._instructions if each.op is Op.WEIGHT_GRADIENT}
        self._inbox: dict[_Key, Receiving | Tensor] = {}
        self._outbox: dict[_Key, Tensor] = {}
        self._passes: dict[_Key, _Pass] = {}
        self._sendings: deque[Sending] = deque()

    def execute(self) -> None:
        for instruction in self._instructions:
            try:
                self._clock.start()
                self._execute(instruction)
                self._clock.stop()
            except TrainmasterError as error:
                error.add_note(f"in {self._where(instruction)}")
                raise
            except Exception as error:  # a model's or an algorithm's: it must say where it was
                what = f"{type(error).__name__}: {error}"
                raise RunError(f"{self._where(instruction)} failed with {what}") from error
        while self._sendings:
            self._sendings.popleft().wait()
        left = [*self._inbox, *self._outbox, *self._passes]
        assert not left, f"buffers were not freed: {left}"

    def _where(self, instruction: Instruction) -> str:
        return f"{instruction} of {self._program.name}, pipeline rank {self._rank} of {len(self._program.ranks)},"

    def _execute(self, instruction: Instruction) -> None:
        match instruction.op:
            case Op.FORWARD:
                self._forward(*_key(instruction))
            case Op.RECOMPUTE:
                self._recompute(*_key(instruction))
            case Op.BACKWARD | Op.INPUT_GRADIENT:
                self._backward(*_key(instruction))
            case Op.WEIGHT_GRADIENT:
                deferred = self._passes.pop(_key(instruction)).deferred
                assert deferred is not None, "an INPUT_GRADIENT leaves its part of the work"
                deferred.run()
            case Op.SEND:
                self._send(instruction)
            case Op.RECEIVE:
                self._receive(instruction)
            case Op.REDUCE:
                assert self._training is not None, "a training program is run with `training`"
                assert instruction.stage is not None, "REDUCE names a stage"
                self._training.reduce(instruction.stage)
            case Op.STEP:
                assert self._training is not None, "a training program is run with `training`"
                self._training.step()
            case Op.SAMPLE | Op.CLOSE:
                raise ProgramError(f"{instruction} is beyond this runner: `generation` runs what generates")
            case _:
                assert_never(instruction.op)

    # -- compute --------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, microbatch: int) -> None:
        received = self._take(EdgeKind.ACTIVATION, stage, microbatch)
        if self._training is None:
            self._deliver(EdgeKind.ACTIVATION, stage, microbatch, self._compute(stage, microbatch, received))
            return
        if received is not None:
            received.requires_grad_()  # without it only the last stage would train
        kept = self._passes[stage, microbatch] = _Pass(received)
        if (stage, microbatch) not in self._recomputed:
            kept.output = self._compute(stage, microbatch, received, kept)
            self._deliver(EdgeKind.ACTIVATION, stage, microbatch, kept.output)
        elif not self._stages[stage].is_last:  # whose output nobody needs before the recomputation
            with torch.no_grad():
                output = self._compute(stage, microbatch, received)
            self._deliver(EdgeKind.ACTIVATION, stage, microbatch, output)

    def _recompute(self, stage: int, microbatch: int) -> None:
        kept = self._passes[stage, microbatch]
        kept.output = self._compute(stage, microbatch, kept.received, kept)

    def _compute(
        self, stage_id: int, microbatch: int, received: Tensor | None, kept: _Pass | None = None
    ) -> Tensor | None:
        """The stage's output, which can be led back from if `kept` is given; the loss on the last."""
        if self._training is not None:
            torch.manual_seed(seed_of(self._training.seed, stage_id, microbatch))
        if kept is not None and (stage_id, microbatch) in self._split:
            kept.deferred = Deferred()
            with deferring(kept.deferred):
                return self._call(stage_id, microbatch, received)
        return self._call(stage_id, microbatch, received)

    def _call(self, stage_id: int, index: int, received: Tensor | None) -> Tensor | None:
        stage, microbatch = self._stages[stage_id], self._microbatches[index]
        hidden: Tensor = stage(microbatch.tokens, microbatch.packed, received)
        return self._finish(stage, hidden, microbatch) if stage.is_last else hidden

    def _backward(self, stage: int, microbatch: int) -> None:
        """Whole, or what WEIGHT_GRADIENT leaves of it."""
        gradient = self._take(EdgeKind.GRADIENT, stage, microbatch)
        kept = self._passes.pop((stage, microbatch))
        assert kept.output is not None, "a backward follows its forward"
        if kept.output.requires_grad:  # else there is nothing to train, here or before
            torch.autograd.backward(kept.output, gradient)
        if kept.received is not None:
            self._deliver(EdgeKind.GRADIENT, stage, microbatch, kept.received.grad)
        if kept.deferred is not None:
            kept.output = kept.received = None
            self._passes[stage, microbatch] = kept

    # -- communication --------------------------------------------------------------------------------------------

    def _take(self, kind: EdgeKind, stage: int, microbatch: int) -> Tensor | None:
        """What has come for a stage, once it is there; None where nothing leads to it."""
        taken: list[Tensor] = []
        for edge in self._topology.into(stage, kind):
            message = self._inbox.pop((edge.id, microbatch))
            if isinstance(message, Receiving):
                message.wait()
                message = message.tensor
            taken.append(message)
        self._clock.start()  # waiting is not work
        assert len(taken) < 2, "stages form chains"
        return taken[0] if taken else None

    def _deliver(self, kind: EdgeKind, stage: int, microbatch: int, tensor: Tensor | None) -> None:
        for edge in self._topology.out_of(stage, kind):
            assert tensor is not None, "what another stage waits for was made"
            box = self._inbox if self._topology.is_local(edge) else self._outbox
            box[edge.id, microbatch] = tensor.detach()

    def _send(self, instruction: Instruction) -> None:
        edge, index = _message(instruction)
        tensor = self._outbox.pop((edge.id, index)).contiguous()
        target = self._topology.stages[edge.target].rank
        self._sendings.append(self._channel(edge).send(tensor, target, self._tag(edge, index)))
        # a backend need not tell that a message has left before it is waited for; the program lets each send wait
        while len(self._sendings) > 2 * len(self._topology.stages):
            self._sendings.popleft().wait()

    def _receive(self, instruction: Instruction) -> None:
        edge, index = _message(instruction)
        num_tokens, stage = self._microbatches[index].num_tokens, self._runner.stages[0]
        tensor = torch.empty(
            1, num_tokens, stage.hidden_size, dtype=self._runner.dtype, device=self._runner.device
        )  # [1, T, H]
        source = self._topology.stages[edge.source].rank
        self._inbox[edge.id, index] = self._channel(edge).expect(tensor, source, self._tag(edge, index))

    def _tag(self, edge: Edge, microbatch: int) -> int:
        """Of a message, the same on both ends: tells edges apart, where ranks have several stages."""
        return microbatch * len(self._topology.edges) + edge.id

    def _channel(self, edge: Edge) -> Group:
        group = self._runner.activations if edge.kind is EdgeKind.ACTIVATION else self._runner.gradients
        assert group is not None, "a program with communication runs on several ranks"
        return group


def _key(instruction: Instruction) -> _Key:
    assert instruction.stage is not None, "compute names a stage"
    assert instruction.microbatch is not None, "compute names a microbatch"
    return instruction.stage, instruction.microbatch


def _message(instruction: Instruction) -> tuple[Edge, int]:
    assert instruction.edge is not None, "communication names an edge"
    assert instruction.microbatch is not None, "communication names a microbatch"
    return instruction.edge, instruction.microbatch
