"""Generation over the pipeline ranks of one replica: runs what `rounds` says, on tensors.

    slots       who sits in which KV slot, and who joins            pure
    rounds      what a rank computes, sends and receives, when      pure
    responses   what is drawn, on the last stage
    here        caches, passes, messages

Invariants: no row of an ended sequence is computed; a message's tag is unique to its microbatch and kind, of which one
at a time is under way between two ranks; tokens depend on weights, seed, sequence and position, not on who shares a
pass, joins or waits, nor on where a round ended. (What a pass computes for a row may differ in its last bits with the
number of rows, as kernels choose their order of sums by it; a draw differs only where its uniform number lies in such a
gap.)

Does not: cut prompts into microbatches, or know of tokenizers.

Shapes: n rows of a microbatch, T tokens of a pass, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ...api.sampling import Sampling
from ..models.attention import PackedPass
from ..models.cache import KVCache
from ..models.stage import Stage
from ..parallel.groups import Group, Receiving, Sending
from .instructions import Edge, EdgeKind, Instruction, Op, Topology
from .responses import Drafts, Prompt, Response, Rows
from .rounds import Turn, ring, turns
from .slots import PAUSED, Pool, Slots

__all__ = ["Prompt", "Response", "Round", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How far one call of `generate` goes, and how much memory it takes. By default to the end, and as it comes."""

    max_tokens: int | None = None
    """KV slots of one open microbatch: the most tokens that they have room for, all together.

    A slot has room for the longest that any sequence of the call may grow to. There are as many open microbatches as
    pipeline ranks at most, each with the layers of each rank. None: a microbatch takes what it needs, and nobody joins.
    """
    max_new_tokens: int | None = None
    """Interrupt each response that gains this many tokens now; at least 1."""
    is_over: Callable[[], bool] | None = None
    """Asked with the last stage after each trip of a microbatch; True interrupts all responses that have not ended."""


def generate(
    stages: Sequence[Stage],
    pipe: Group | None,
    microbatches: Sequence[Sequence[Prompt]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
    device: torch.device,
    home: Group | None = None,
    limits: Round | None = None,
) -> list[Response] | None:
    """Responds to every prompt. All pipeline ranks of a replica call this at once, each with its own stages, and
    otherwise with the same arguments.

    `stages`: stage s is on rank s mod the number of ranks. `pipe` joins the ranks; None if there is one. `home` joins
    them, too, and carries what goes from the last rank to the first; by default `pipe` does, which is right for gloo,
    while NCCL runs the messages of both directions between two ranks in one order and may wait crosswise. `stop_ids`:
    all tokens that end a response.

    Returns, with the last stage, the responses in the order of prompts, microbatch after microbatch; None elsewhere.
    The stages' mode is left as it was. Raises RunError for a prompt that alone outgrows `limits.max_tokens`, and, with
    the last stage, if logits were no finite numbers.
    """
    assert all(microbatches), "a microbatch has at least one prompt"
    num_ranks, rank = (1, 0) if pipe is None else (pipe.size, pipe.index)
    topology = ring(num_ranks, len(stages))
    assert [stage.index for stage in stages] == [stage.id for stage in topology.stages_of(rank)], (
        f"rank {rank} of {num_ranks} holds other stages than its own"
    )
    limits = limits or Round()
    prompts = [prompt for microbatch in microbatches for prompt in microbatch]
    ends = list(accumulate(map(len, microbatches), initial=0))
    by_index = [range(*each) for each in pairwise(ends)]
    claims = [prompt.claim(sampling) for prompt in prompts]
    slots = Slots(claims, by_index, num_ranks, limits.max_tokens)
    with torch.inference_mode(), _evaluating(stages):
        stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=device)
        drafts = Drafts(prompts, sampling, stops, seed, limits.max_new_tokens) if stages[-1].is_last else None
        held = {stage.index: stage for stage in stages}
        seat = _Seat(topology, held, pipe, home or pipe, device, prompts, drafts, limits.is_over)
        walk, answer = turns(topology, rank, slots), None
        while True:
            try:
                turn = walk.send(answer)
            except StopIteration:
                break
            answer = seat.execute(turn)
        seat.wait()
    return None if drafts is None else drafts.responses()


@contextmanager
def _evaluating(stages: Sequence[Stage]) -> Iterator[None]:
    training = [stage for stage in stages if stage.training]
    for stage in training:
        stage.eval()
    try:
        yield
    finally:
        for stage in training:
            stage.train()


@dataclass(slots=True)
class _Flight:
    """What one open microbatch has on one rank."""

    caches: dict[int, KVCache] = field(default_factory=dict)
    """By stage."""
    tokens: Tensor | None = None
    """`[n]`, int64: the marks of the last trip."""
    hidden: Tensor | None = None
    """`[1, T, H]`: made by the last pass."""
    rows: Rows | None = None
    """Of the last stage."""
    arriving: Receiving | None = None
    """What was last begun to be received."""
    sendings: list[Sending] = field(default_factory=list)

    def arrived(self) -> Tensor:
        """What is arriving, once it is here; and all that was sent before has left, for it led to this."""
        receiving, self.arriving = self.arriving, None
        assert receiving is not None, "a RECEIVE stands before its use"
        receiving.wait()
        for sending in self.sendings:
            sending.wait()
        self.sendings.clear()
        return receiving.tensor


@dataclass(slots=True)
class _Seat:
    """One rank in the ring."""

    topology: Topology
    stages: Mapping[int, Stage]
    """Its own, by index."""
    pipe: Group | None
    home: Group | None
    device: torch.device
    prompts: Sequence[Prompt]
    drafts: Drafts | None
    """With the last stage."""
    is_over: Callable[[], bool] | None
    _flights: dict[int, _Flight] = field(default_factory=dict)
    """By microbatch."""
    _leaving: list[Sending] = field(default_factory=list)
    """Of closed ones."""
    _was_over: bool = False

    def execute(self, turn: Turn) -> Sequence[int] | None:
        """Runs one instruction. Returns the marks, if they are wanted."""
        pool, instruction = turn.pool, turn.instruction
        flight = self._flights.get(pool.microbatch)
        if flight is None:
            flight = self._flights[pool.microbatch] = _Flight()
        match instruction.op:
            case Op.FORWARD:
                self._forward(self._stage(instruction), pool, flight)
            case Op.SAMPLE:
                return self._sample(self._stage(instruction), flight)
            case Op.RECEIVE if turn.is_answered:
                flight.tokens = flight.arrived()
                return _as_list(flight.tokens)
            case Op.RECEIVE:
                flight.arriving = self._receive(instruction, pool)
            case Op.SEND:
                self._send(instruction, flight)
            case Op.CLOSE:
                self._close(self._stage(instruction), pool, flight)
            case _:
                raise AssertionError(f"{instruction} is of no generation")
        return None

    def wait(self) -> None:
        """Until all that was sent has left."""
        for sending in self._leaving:
            sending.wait()

    def _stage(self, instruction: Instruction) -> Stage:
        assert instruction.stage is not None, "compute names a stage"
        return self.stages[instruction.stage]

    def _forward(self, stage: Stage, pool: Pool, flight: _Flight) -> None:
        """Of the rows that go on, and those that join."""
        received = None if stage.is_first else flight.hidden if self.pipe is None else flight.arrived()
        joining = [self.prompts[sequence].tokens for sequence in pool.joining]
        parts = [tokens.to(self.device) for tokens in joining]
        if pool.order:
            assert flight.tokens is not None, "who goes on has got a token"
            is_same = len(pool.order) == len(flight.tokens)
            parts.insert(0, flight.tokens if is_same else flight.tokens[torch.tensor(pool.order, device=self.device)])
        ids = torch.cat(parts) if joining else parts[0]
        cache = flight.caches.get(stage.index)
        if cache is None:
            cache = flight.caches[stage.index] = KVCache(pool.num_slots, pool.slot_tokens)
        cache.keep(pool.order)
        current = PackedPass.step(cache, tuple([len(tokens) for tokens in joining]), self.device)
        flight.hidden = stage.run(ids[None], current, received)
        if stage.is_last:
            assert self.drafts is not None, "the last stage samples"
            flight.rows = self.drafts.follow(flight.rows, pool.order, pool.joining)
            if joining:  # the last token of each
                ends = torch.tensor(current.batch.seqlens).cumsum(0) - 1
                flight.hidden = flight.hidden[:, ends.to(self.device)]

    def _sample(self, stage: Stage, flight: _Flight) -> Sequence[int]:
        assert self.drafts is not None, "the last stage samples"
        assert flight.rows is not None, "a SAMPLE follows its FORWARD"
        assert flight.hidden is not None, "a SAMPLE follows its FORWARD"
        tokens = self.drafts.add(flight.rows, stage.logits(flight.hidden)[0])
        self._was_over = self._was_over or (self.is_over is not None and self.is_over())
        flight.tokens = torch.full_like(tokens, PAUSED) if self._was_over else tokens
        return _as_list(flight.tokens)

    def _close(self, stage: Stage, pool: Pool, flight: _Flight) -> None:
        del flight.caches[stage.index]
        if not flight.caches:
            self._leaving += self._flights.pop(pool.microbatch).sendings

    def _receive(self, instruction: Instruction, pool: Pool) -> Receiving:
        edge = instruction.edge
        assert edge is not None, "RECEIVE names an edge"
        match edge.kind:
            case EdgeKind.TOKEN:
                tensor = torch.empty(len(pool.rows), dtype=torch.int64, device=self.device)
            case EdgeKind.ACTIVATION:
                num_tokens, stage = len(pool.order), self.stages[edge.target]
                num_tokens += sum(len(self.prompts[sequence].tokens) for sequence in pool.joining)
                shape = 1, num_tokens, stage.hidden_size
                tensor = torch.empty(shape, dtype=stage.model.dtype, device=self.device)
            case _:
                raise AssertionError(f"{instruction} is of no generation")
        source, _ = self.topology.ends(edge)
        return self._group(edge).expect(tensor, source, _tag(instruction, edge))

    def _send(self, instruction: Instruction, flight: _Flight) -> None:
        edge = instruction.edge
        assert edge is not None, "SEND names an edge"
        tensor = flight.tokens if edge.kind is EdgeKind.TOKEN else flight.hidden
        assert tensor is not None, "what is sent was made before"
        _, target = self.topology.ends(edge)
        flight.sendings.append(self._group(edge).send(tensor.contiguous(), target, _tag(instruction, edge)))

    def _group(self, edge: Edge) -> Group:
        source, _ = self.topology.ends(edge)
        group = self.home if source == self.topology.num_ranks - 1 else self.pipe
        assert group is not None, "several ranks have a pipe"
        return group


def _tag(instruction: Instruction, edge: Edge) -> int:
    assert instruction.microbatch is not None, "a message is of a microbatch"
    return 2 * instruction.microbatch + (edge.kind is EdgeKind.ACTIVATION)


def _as_list(tokens: Tensor) -> list[int]:
    values: list[int] = tokens.tolist()
    return values
