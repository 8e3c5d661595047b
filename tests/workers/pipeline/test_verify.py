"""Mutations of good programs: what breaks a program must be rejected before it runs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from trainmaster.workers.pipeline.instructions import Edge, EdgeKind, Instruction, Op, Program
from trainmaster.workers.pipeline.lowering import add_communication, inference_program, training_program
from trainmaster.workers.pipeline.verify import ProgramError, verify

PROGRAMS = [make(p, m) for make in (training_program, inference_program) for p in (1, 2, 3, 4) for m in (1, 2, 5)]
SMALL = [make(p, m) for make in (training_program, inference_program) for p in (1, 2, 3) for m in (1, 3)]


def named(program: Program) -> str:
    return f"{program.name}-{len(program.ranks)}-{program.num_microbatches}"


def with_rank(program: Program, rank: int, instructions: list[Instruction]) -> Program:
    ranks = list(program.ranks)
    ranks[rank] = tuple(instructions)
    return replace(program, ranks=tuple(ranks))


def mutations(program: Program, change: Callable[[list[Instruction], int], None]) -> Iterator[tuple[str, Program]]:
    """The program with a change at every instruction, one at a time."""
    for rank, instructions in enumerate(program.ranks):
        for at, instruction in enumerate(instructions):
            changed = list(instructions)
            change(changed, at)
            yield f"rank {rank}, {instruction}", with_rank(program, rank, changed)


def accepted(candidates: Iterator[tuple[str, Program]]) -> list[str]:
    """Names of the candidates that the verifier lets pass."""
    passed = []
    for name, candidate in candidates:
        try:
            verify(candidate)
        except ProgramError:
            continue
        passed.append(name)
    return passed


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_a_dropped_instruction_is_rejected(program: Program):
    assert not accepted(mutations(program, lambda instructions, at: instructions.pop(at)))


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_a_doubled_instruction_is_rejected(program: Program):
    assert not accepted(mutations(program, lambda instructions, at: instructions.insert(at, instructions[at])))


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_a_message_that_is_doubled_on_both_ends_is_rejected(program: Program):
    def candidates() -> Iterator[tuple[str, Program]]:
        for rank, instructions in enumerate(program.ranks):
            for each in instructions:
                if each.op is not Op.SEND:
                    continue
                assert each.edge is not None
                target = each.edge.target
                there = list(program.ranks[target])
                at = there.index(Instruction(Op.RECEIVE, target, each.microbatch, each.edge))
                there.insert(at, there[at])
                here = list(instructions)
                here.insert(here.index(each), each)
                yield str(each), with_rank(with_rank(program, rank, here), target, there)

    assert not accepted(candidates())


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_an_instruction_of_another_microbatch_is_rejected(program: Program):
    def shift(instructions: list[Instruction], at: int) -> None:
        microbatch = instructions[at].microbatch
        instructions[at] = replace(instructions[at], microbatch=0 if microbatch is None else microbatch + 1)

    with_microbatch = (
        (name, candidate)
        for name, candidate in mutations(program, shift)
        if "reduce" not in name and "step" not in name
    )
    assert not accepted(with_microbatch)


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_an_instruction_of_another_stage_is_rejected(program: Program):
    """A rank runs its own stage: the runner would do a foreign stage's work on its own weights."""
    for offset in (-1, 1):

        def shift(instructions: list[Instruction], at: int, offset: int = offset) -> None:
            instructions[at] = replace(instructions[at], stage=instructions[at].stage + offset)

        assert not accepted(mutations(program, shift))


@pytest.mark.parametrize("program", [each for each in PROGRAMS if len(each.ranks) > 1], ids=named)
def test_ranks_that_changed_places_are_rejected(program: Program):
    with pytest.raises(ProgramError, match=program.name):
        verify(replace(program, ranks=program.ranks[::-1]))


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_a_message_on_another_edge_is_rejected(program: Program):
    def other_kind(instructions: list[Instruction], at: int) -> None:
        edge = instructions[at].edge
        if edge is None:
            instructions.pop(at)
            return
        kind = EdgeKind.GRADIENT if edge.kind is EdgeKind.ACTIVATION else EdgeKind.ACTIVATION
        instructions[at] = replace(instructions[at], edge=replace(edge, kind=kind))

    def other_way(instructions: list[Instruction], at: int) -> None:
        edge = instructions[at].edge
        if edge is None:
            instructions.pop(at)
            return
        instructions[at] = replace(instructions[at], edge=Edge(edge.kind, edge.target, edge.source))

    assert not accepted(mutations(program, other_kind))
    assert not accepted(mutations(program, other_way))


def is_possible(instructions: list[Instruction], stage: int, num_stages: int, is_training: bool) -> bool:
    """Whether this order respects what a rank's instructions need of each other, whatever other ranks do."""
    place = {each: at for at, each in enumerate(instructions)}

    def before(first: Instruction, second: Instruction) -> bool:
        return place[first] < place[second]

    def message(op: Op, microbatch: int | None, kind: EdgeKind, source: int, target: int) -> Instruction:
        return Instruction(op, stage, microbatch, Edge(kind, source, target))

    for microbatch in sorted({each.microbatch for each in instructions if each.microbatch is not None}):
        forward, backward = (Instruction(op, stage, microbatch) for op in (Op.FORWARD, Op.BACKWARD))
        needed = []
        if stage > 0:
            needed.append((message(Op.RECEIVE, microbatch, EdgeKind.ACTIVATION, stage - 1, stage), forward))
        if stage < num_stages - 1:
            needed.append((forward, message(Op.SEND, microbatch, EdgeKind.ACTIVATION, stage, stage + 1)))
        if is_training:
            needed.append((forward, backward))
            if stage < num_stages - 1:
                needed.append((message(Op.RECEIVE, microbatch, EdgeKind.GRADIENT, stage + 1, stage), backward))
            if stage > 0:
                needed.append((backward, message(Op.SEND, microbatch, EdgeKind.GRADIENT, stage, stage - 1)))
            needed += [(backward, Instruction(Op.REDUCE, stage))]
        if not all(before(first, second) for first, second in needed):
            return False
    return not is_training or before(Instruction(Op.REDUCE, stage), Instruction(Op.STEP, stage))


def test_the_oracle_takes_good_programs():
    for program in PROGRAMS:
        for stage, instructions in enumerate(program.ranks):
            assert is_possible(list(instructions), stage, len(program.ranks), program.name == "1f1b")


@pytest.mark.parametrize("program", SMALL, ids=named)
def test_an_instruction_moved_across_what_it_needs_is_rejected(program: Program):
    def candidates() -> Iterator[tuple[str, Program]]:
        for rank, instructions in enumerate(program.ranks):
            for source in range(len(instructions)):
                for target in range(len(instructions)):
                    moved = list(instructions)
                    moved.insert(target, moved.pop(source))
                    if not is_possible(moved, rank, len(program.ranks), program.name == "1f1b"):
                        yield f"rank {rank}: {instructions[source]} to {target}", with_rank(program, rank, moved)

    assert not accepted(candidates())


@pytest.mark.parametrize("program", [each for each in SMALL if len(each.ranks) > 1], ids=named)
def test_a_message_out_of_turn_is_rejected(program: Program):
    """Channels are first in, first out: two receives of one channel cannot change places."""

    def candidates() -> Iterator[tuple[str, Program]]:
        for rank, instructions in enumerate(program.ranks):
            by_edge: dict[Edge | None, list[int]] = {}
            for at, each in enumerate(instructions):
                if each.op is Op.RECEIVE:
                    by_edge.setdefault(each.edge, []).append(at)
            for places in by_edge.values():
                for first, second in pairwise(places):
                    swapped = list(instructions)
                    swapped[first], swapped[second] = swapped[second], swapped[first]
                    yield str(instructions[first]), with_rank(program, rank, swapped)

    assert not accepted(candidates())


def test_a_1f1b_whose_last_rank_is_shifted_by_one_is_rejected():
    """Forwards 1 2 3 4 where 0 1 2 3 belong: forward 0 is missing and forward 4 is out of range."""
    good = training_program(2, 4)
    order = [(Op.FORWARD, 1), (Op.BACKWARD, 0), (Op.FORWARD, 2), (Op.BACKWARD, 1)]
    order += [(Op.FORWARD, 3), (Op.BACKWARD, 2), (Op.FORWARD, 4), (Op.BACKWARD, 3)]
    compute = [Instruction(op, 1, microbatch) for op, microbatch in order]
    compute += [Instruction(Op.REDUCE, 1), Instruction(Op.STEP, 1)]
    ranks = add_communication((good.ranks[0][:0], tuple(compute)))
    with pytest.raises(ProgramError, match=r"microbatch [04]\) stands [01] times in rank 1"):
        verify(with_rank(good, 1, list(ranks[1])))


def test_two_ranks_that_wait_for_each_other_are_rejected():
    good = training_program(2, 2)
    first = list(good.ranks[0])
    sends = [each for each in first if each.op is Op.SEND]
    late = [each for each in first if each != sends[1]]
    late.insert(len(late) - 2, sends[1])  # the second activation goes up only after both gradients came down
    with pytest.raises(ProgramError, match=r"1f1b: the program cannot get past .*gradient 1->0, microbatch 1"):
        verify(with_rank(good, 0, late))


def test_the_error_names_the_instruction():
    good = training_program(1, 2)
    with pytest.raises(ProgramError, match=r"1f1b: backward\(0, microbatch 1\) stands 0 times in rank 0"):
        verify(with_rank(good, 0, [each for each in good.ranks[0] if str(each) != "backward(0, microbatch 1)"]))
    with pytest.raises(
        ProgramError, match=r"1f1b: (rank 0 must end in one REDUCE and one STEP|step\(0\) stands 0 times)"
    ):
        verify(with_rank(good, 0, list(good.ranks[0][:-1])))
    sent = [*good.ranks[0][:1], Instruction(Op.SEND, 0, 0, Edge(EdgeKind.ACTIVATION, 0, 1)), *good.ranks[0][1:]]
    with pytest.raises(
        ProgramError, match=r"send\(activation 0->1, microbatch 0\) (cannot stand|stands 1 times) in rank 0"
    ):
        verify(with_rank(good, 0, sent))
