"""Proves a program before it runs: it ends, in order, and does everything once. Pure.

What holds of a program that passes, by the numbers of the invariants in docs/pipelines.md:

1. Every microbatch goes forward once through each piece of the model (each replica group; in generation once a trip,
   up to a CLOSE), and either backward once, or once for its input and then once for its weights, or nowhere back. Each
   stage ends its gradients with one REDUCE, each rank with one STEP as its last instruction.
2. What an instruction needs stands before it: forward, recomputation, gradient of the input, gradient of the weights;
   a receive before its use, a send after what it sends.
3. The messages between two ranks, of one kind, are received as they are sent; none is left.
4. It comes to its end, both if sends never wait and if each waits for its receive.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest

from ...api.errors import ProgramError
from .dependencies import Channels, Dependencies, advance, find, key_of, places_of
from .instructions import COMMUNICATION, EdgeKind, Instruction, Op, Program, Topology

_NO_TIME = dict.fromkeys(Op, 0.0)
_GRADIENTS = frozenset({Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT})


def verify(program: Program) -> None:
    """Raises ProgramError that names the first instruction that cannot run, is missing, doubled or out of place."""
    dependencies = _in_order(program, is_silent=False)
    _check_channels(program)
    # all that waits with buffered channels waits with a rendezvous, too: what ends with the latter ends with both
    if _stuck(dependencies, Channels.RENDEZVOUS):
        _check_end(dependencies, Channels.BUFFERED)
        _check_end(dependencies, Channels.RENDEZVOUS)


def verify_compute(program: Program) -> None:
    """The same for a program without communication: whether there is a way to add it."""
    for rank, instructions in enumerate(program.ranks):
        for each in instructions:
            if each.op in COMMUNICATION:
                raise ProgramError(f"{program.name}: {each} in rank {rank} of a program that has compute only")
    _check_end(_in_order(program, is_silent=True), Channels.BUFFERED)


def _in_order(program: Program, is_silent: bool) -> Dependencies:
    _check_topology(program)
    for rank, instructions in enumerate(program.ranks):
        for each in instructions:
            _check_place(program, each, rank)
    places = places_of(program)
    _check_counts(program)
    _check_ends(program)
    dependencies = find(program, places, is_silent)
    for rank, instructions in enumerate(program.ranks):
        for position, needed in enumerate(dependencies.own[rank]):
            late = [at for at in needed if at >= position]
            if late:
                each, before = instructions[position], instructions[late[0]]
                raise ProgramError(f"{program.name}: {each} in rank {rank} stands before {before}, which it needs")
    return dependencies


def _check_topology(program: Program) -> None:
    topology = program.topology
    stages, edges = topology.stages, topology.edges
    ids = range(len(stages))
    if not stages or [stage.id for stage in stages] != list(ids) or [e.id for e in edges] != list(range(len(edges))):
        raise ProgramError(f"{program.name}: stages and edges must be numbered from 0, and one stage must be there")
    if {stage.rank for stage in stages} != set(range(len(program.ranks))):
        raise ProgramError(f"{program.name}: its {len(program.ranks)} ranks must each have a stage, and no other rank")
    for edge in edges:
        if (
            edge.source not in ids
            or edge.target not in ids
            or (edge.source == edge.target and edge.kind is not EdgeKind.TOKEN)
        ):
            raise ProgramError(f"{program.name}: {edge} must join two of {len(stages)} stages")
    if program.num_microbatches < 1:
        raise ProgramError(f"{program.name}: {program.num_microbatches} microbatches, where one is the least")


def _check_place(program: Program, each: Instruction, rank: int) -> None:
    """It names what its op needs, and that is at home on this rank."""
    topology, edge, stage, fits = program.topology, each.edge, each.stage, False
    if each.op is Op.STEP:
        fits = stage is None and edge is None
    elif each.op not in COMMUNICATION:
        if edge is None and stage is not None and 0 <= stage < len(topology.stages):
            fits = topology.stages[stage].rank == rank
    elif stage is None and edge is not None and 0 <= edge.id < len(topology.edges):
        source, target = topology.ends(topology.edges[edge.id])
        fits = source != target and rank == (source if each.op is Op.SEND else target)
        fits = fits and (topology.edges[edge.id] is edge or topology.edges[edge.id] == edge)
    if each.op in (Op.STEP, Op.REDUCE):
        fits = fits and each.microbatch is None and each.trip == 0
    else:
        fits = fits and each.microbatch is not None and 0 <= each.microbatch < program.num_microbatches
    if not fits or each.trip < 0:
        raise ProgramError(
            f"{program.name}: {each} cannot stand in rank {rank} of {len(program.ranks)}, "
            f"with {program.num_microbatches} microbatches"
        )


_Found = dict[tuple[int, int], set[tuple[Op, int]]]
"""By stage and microbatch: the ops that stand, with their trips."""


def _check_counts(program: Program) -> None:
    """Everything once; nothing stands twice, that is known."""
    topology = program.topology
    found: _Found = {(stage.id, at): set() for stage in topology.stages for at in range(program.num_microbatches)}
    for rank in program.ranks:
        for each in rank:
            if each.stage is not None and each.microbatch is not None:
                found[each.stage, each.microbatch].add((each.op, each.trip))
    is_training = any(each.op in _GRADIENTS for rank in program.ranks for each in rank)
    groups: dict[int, list[int]] = {}
    for each_stage in topology.stages:
        groups.setdefault(each_stage.replica_group, []).append(each_stage.id)
    for stages in groups.values():
        for microbatch in range(program.num_microbatches):
            takers = [stage for stage in stages if (Op.FORWARD, 0) in found[stage, microbatch]]
            if not takers:
                raise _miscounted(program, Op.FORWARD, stages[0], microbatch, 0, is_there=False)
            if takers[1:]:
                raise _miscounted(program, Op.FORWARD, takers[1], microbatch, 0, is_there=True)
            for stage in stages:
                here = found[stage, microbatch]
                wanted = _wanted(topology, stage, here, is_training) if stage == takers[0] else set()
                for op, trip in sorted(here ^ wanted):
                    raise _miscounted(program, op, stage, microbatch, trip, is_there=(op, trip) in here)
    for edge in topology.edges:
        for microbatch in range(program.num_microbatches):
            source, target = (_num_trips(found[stage, microbatch]) for stage in (edge.source, edge.target))
            if source != target:
                raise ProgramError(
                    f"{program.name}: microbatch {microbatch} goes forward {source} times through stage {edge.source}, "
                    f"and {target} times through stage {edge.target}, which an edge joins"
                )


def _num_trips(found: set[tuple[Op, int]]) -> int:
    return [op for op, _ in found].count(Op.FORWARD)


def _wanted(topology: Topology, stage: int, found: set[tuple[Op, int]], is_training: bool) -> set[tuple[Op, int]]:
    """What a stage has to do with a microbatch that goes through it."""
    if topology.is_generating:
        num_trips = _num_trips(found)
        has_head = bool(topology.out_of(stage, EdgeKind.TOKEN))
        ops = (Op.FORWARD, Op.SAMPLE) if has_head else (Op.FORWARD,)
        return {(op, trip) for op in ops for trip in range(num_trips)} | {(Op.CLOSE, num_trips)}
    wanted = {(Op.FORWARD, 0)}
    if is_training:
        is_split = bool(found & {(Op.INPUT_GRADIENT, 0), (Op.WEIGHT_GRADIENT, 0)})
        wanted |= {(Op.INPUT_GRADIENT, 0), (Op.WEIGHT_GRADIENT, 0)} if is_split else {(Op.BACKWARD, 0)}
        wanted |= found & {(Op.RECOMPUTE, 0)}
    return wanted


def _miscounted(program: Program, op: Op, stage: int, microbatch: int, trip: int, is_there: bool) -> ProgramError:
    instruction = Instruction(op, stage, microbatch, trip=trip)
    rank = program.topology.stages[stage].rank
    rule = "stands in rank {}, where it must not" if is_there else "stands nowhere in rank {}, where it must"
    return ProgramError(f"{program.name}: {instruction} {rule.format(rank)}")


def _check_ends(program: Program) -> None:
    """REDUCE once a stage, after its last gradient; STEP once, as the last instruction. Or neither of them."""
    is_training = any(each.op in _GRADIENTS for rank in program.ranks for each in rank)
    for rank, instructions in enumerate(program.ranks):
        steps = [at for at, each in enumerate(instructions) if each.op is Op.STEP]
        if steps != ([len(instructions) - 1] if is_training else []):
            rule = "must end in one step" if is_training else "has no gradients to step with"
            raise ProgramError(f"{program.name}: rank {rank} {rule}, but has steps at {steps} of {len(instructions)}")
        last: dict[int | None, int] = {}
        reduces: dict[int | None, int] = {}
        for position, each in enumerate(instructions):
            if each.op in _GRADIENTS:
                last[each.stage] = position
            elif each.op is Op.REDUCE:
                reduces[each.stage] = position
        for stage in program.topology.stages_of(rank):
            reduce = Instruction(Op.REDUCE, stage.id)
            if (stage.id in reduces) != is_training:
                rule = "stands nowhere in" if is_training else "has no gradients in"
                raise ProgramError(f"{program.name}: {reduce} {rule} rank {rank}")
            if is_training and reduces[stage.id] < last.get(stage.id, -1):
                late = instructions[last[stage.id]]
                raise ProgramError(f"{program.name}: {reduce} in rank {rank} stands before {late}, which it needs")


def _check_channels(program: Program) -> None:
    """Between two ranks, messages of a kind are received as they are sent."""
    sent: dict[tuple[int, int, EdgeKind], list[Instruction]] = defaultdict(list)
    received: dict[tuple[int, int, EdgeKind], list[Instruction]] = defaultdict(list)
    for instructions in program.ranks:
        for each in instructions:
            if each.edge is not None:
                side = sent if each.op is Op.SEND else received
                side[*program.topology.ends(each.edge), each.edge.kind].append(each)
    for channel, sends in sent.items():
        for send, receive in zip_longest(sends, received[channel]):
            if receive is None:
                raise ProgramError(f"{program.name}: {send} in rank {channel[0]} is never received")
            # each has its SEND: there are no more of them
            if key_of(send)[1:] != key_of(receive)[1:]:
                raise ProgramError(
                    f"{program.name}: {receive} in rank {channel[1]} is out of turn: rank {channel[0]} comes to {send}"
                )


def _check_end(dependencies: Dependencies, channels: Channels) -> None:
    if stuck := _stuck(dependencies, channels):
        name = dependencies.program.name
        raise ProgramError(f"{name}: with {channels} channels it cannot get past {', '.join(stuck)}")


def _stuck(dependencies: Dependencies, channels: Channels) -> list[str]:
    """Where ranks get no further, and behind what."""
    program, waits = dependencies.program, dependencies.waits(channels)
    ends = advance(program, waits, _NO_TIME, _NO_TIME)
    stuck = []
    for rank, instructions in enumerate(program.ranks):
        position = len(ends[rank])
        if position < len(instructions):
            other, at = next(place for place in waits[rank][position] if place[1] >= len(ends[place[0]]))
            stuck.append(f"{instructions[position]} in rank {rank} (after {program.ranks[other][at]} in rank {other})")
    return stuck
