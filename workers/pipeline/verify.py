"""Proves a program before it runs: it ends, in order, and does everything once. Pure.

What holds of a program that passes, by the numbers of the invariants in docs/pipelines.md:

1. Every microbatch goes forward once through each piece of the model (each replica group; in generation once a trip,
   up to a CLOSE), and either backward once, or once for its input and then once for its weights, or nowhere back. Each
   stage ends its gradients with one REDUCE, each rank with one STEP as its last instruction.
2. What an instruction needs stands before it: forward, recomputation, gradient of the input, gradient of the weights;
   a receive before its use, a send after what it sends.
3. The messages between two ranks, of one kind, are received as they are sent; none is left.
4. It comes to its end, both if sends never wait and if each waits for its receive.
5. Two that are co-issued are compute, and neither waits for the other, also not by way of other ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from ...api.errors import ProgramError
from .dependencies import Channels, Dependencies, Key, advance, find, keys_of, places_of
from .instructions import COMMUNICATION, COMPUTE, EdgeKind, Instruction, Op, Program, Topology

_NO_DELAYS = dict.fromkeys(Op, 0.0)
_GRADIENTS = frozenset({Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT})
_OF_A_MICROBATCH = COMPUTE | {Op.SAMPLE, Op.CLOSE}
"""What a stage does with one."""


def verify(program: Program) -> None:
    """Raises ProgramError that names the first instruction that cannot run, is missing, doubled or out of place."""
    dependencies = _in_order(program, is_silent=False)
    _check_channels(dependencies)
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
    keys = keys_of(program)
    for rank in range(len(program.ranks)):
        _check_places(program, keys[rank], rank)
    places = places_of(program, keys)
    is_training = any(key[0] in _GRADIENTS for keys_of_rank in keys for key in keys_of_rank)
    _check_counts(program, keys, is_training)
    _check_ends(program, keys, is_training)
    dependencies = find(program, keys, places, is_silent)
    for rank in range(len(program.ranks)):
        _check_pairs(dependencies, rank)
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


def _check_places(program: Program, keys: Sequence[Key], rank: int) -> None:
    """Each names what its op needs, and that is at home on this rank."""
    edges, count = program.topology.edges, program.num_microbatches
    fitting: dict[tuple[Op, int | None, int, bool], bool] = {}
    for each, (op, where, microbatch, trip) in zip(program.ranks[rank], keys, strict=True):
        edge = each.edge
        named = op, each.stage, where, edge is None
        fits = fitting.get(named)
        if fits is None:
            fits = fitting[named] = _fits(program.topology, each, rank)
        if op is Op.STEP or op is Op.REDUCE:
            fits = fits and each.microbatch is None and trip == 0
        else:
            fits = fits and 0 <= microbatch < count and trip >= 0
        if not fits or (edge is not None and edge is not edges[where] and edge != edges[where]):
            raise ProgramError(
                f"{program.name}: {each} cannot stand in rank {rank} of {len(program.ranks)}, with {count} microbatches"
            )


def _fits(topology: Topology, each: Instruction, rank: int) -> bool:
    """Whether its stage or edge is one for its op, and for this rank."""
    edge, stage = each.edge, each.stage
    if each.op is Op.STEP:
        return stage is None and edge is None
    if each.op not in COMMUNICATION:
        is_there = edge is None and stage is not None and 0 <= stage < len(topology.stages)
        return is_there and topology.stages[stage or 0].rank == rank
    if stage is not None or edge is None or not 0 <= edge.id < len(topology.edges):
        return False
    source, target = topology.ends(topology.edges[edge.id])
    return source != target and rank == (source if each.op is Op.SEND else target)


def _check_pairs(dependencies: Dependencies, rank: int) -> None:
    """What is co-issued is two of compute, and the second does not need the first."""
    program = dependencies.program
    instructions = program.ranks[rank]
    for position, each in enumerate(instructions):
        if not each.is_with_next:
            continue
        rule = f"{program.name}: {each} in rank {rank} cannot be co-issued"
        if position + 1 == len(instructions):
            raise ProgramError(f"{rule}: nothing follows it")
        other = instructions[position + 1]
        if not {each.op, other.op} <= COMPUTE:
            raise ProgramError(f"{rule} with {other}: both must be of {', '.join(sorted(COMPUTE))}")
        if other.is_with_next:
            raise ProgramError(f"{rule} with {other}, which is co-issued with the next already")
        if position in dependencies.own[rank][position + 1]:
            raise ProgramError(f"{rule} with {other}, which needs it")


_Found = tuple[tuple[Op, int], ...]
"""Ops that a stage has for a microbatch, with their trips."""


def _check_counts(program: Program, keys: Sequence[Sequence[Key]], is_training: bool) -> None:
    """Everything once; nothing stands twice, that is known."""
    topology, count = program.topology, program.num_microbatches
    listed: list[list[list[tuple[Op, int]]]] = [[[] for _ in range(count)] for _ in topology.stages]
    for keys_of_rank in keys:
        for op, where, microbatch, trip in keys_of_rank:
            if op in _OF_A_MICROBATCH:
                listed[where][microbatch].append((op, trip))
    found = [[tuple(ops) for ops in by_microbatch] for by_microbatch in listed]
    groups: dict[int, list[int]] = {}
    for each_stage in topology.stages:
        groups.setdefault(each_stage.replica_group, []).append(each_stage.id)
    known: set[tuple[int, _Found]] = set()
    for stages in groups.values():
        for microbatch in range(count):
            takers = [stage for stage in stages if (Op.FORWARD, 0) in found[stage][microbatch]]
            if not takers:
                raise _miscounted(program, Op.FORWARD, stages[0], microbatch, 0, is_there=False)
            if takers[1:]:
                raise _miscounted(program, Op.FORWARD, takers[1], microbatch, 0, is_there=True)
            for stage in stages:
                ops = found[stage][microbatch]
                if stage == takers[0] and (stage, ops) in known:
                    continue
                here = set(ops)
                wanted = _wanted(topology, stage, here, is_training) if stage == takers[0] else set()
                for op, trip in sorted(here ^ wanted):
                    raise _miscounted(program, op, stage, microbatch, trip, is_there=(op, trip) in here)
                known.add((stage, ops))
    _check_trips(program, found)


def _check_trips(program: Program, found: Sequence[Sequence[_Found]]) -> None:
    """Stages that an edge joins see a microbatch as often."""
    num_trips = [[_num_trips(ops) for ops in by_microbatch] for by_microbatch in found]
    for edge in program.topology.edges:
        for microbatch, (source, target) in enumerate(zip(num_trips[edge.source], num_trips[edge.target], strict=True)):
            if source != target:
                raise ProgramError(
                    f"{program.name}: microbatch {microbatch} goes forward {source} times through stage {edge.source}, "
                    f"and {target} times through stage {edge.target}, which an edge joins"
                )


def _num_trips(found: Collection[tuple[Op, int]]) -> int:
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


def _check_ends(program: Program, keys: Sequence[Sequence[Key]], is_training: bool) -> None:
    """REDUCE once a stage, after its last gradient; STEP once, as the last instruction. Or neither of them."""
    for rank, keys_of_rank in enumerate(keys):
        steps: list[int] = []
        last: dict[int, int] = {}
        reduces: dict[int, int] = {}
        for position, (op, where, _, _) in enumerate(keys_of_rank):
            if op in _GRADIENTS:
                last[where] = position
            elif op is Op.REDUCE:
                reduces[where] = position
            elif op is Op.STEP:
                steps.append(position)
        if steps != ([len(keys_of_rank) - 1] if is_training else []):
            rule = "must end in one step" if is_training else "has no gradients to step with"
            raise ProgramError(f"{program.name}: rank {rank} {rule}, but has steps at {steps} of {len(keys_of_rank)}")
        for stage in program.topology.stages_of(rank):
            reduce = Instruction(Op.REDUCE, stage.id)
            if (stage.id in reduces) != is_training:
                rule = "stands nowhere in" if is_training else "has no gradients in"
                raise ProgramError(f"{program.name}: {reduce} {rule} rank {rank}")
            if is_training and reduces[stage.id] < last.get(stage.id, -1):
                late = program.ranks[rank][last[stage.id]]
                raise ProgramError(f"{program.name}: {reduce} in rank {rank} stands before {late}, which it needs")


def _check_channels(dependencies: Dependencies) -> None:
    """Between two ranks, messages of a kind are received as they are sent."""
    program, messages = dependencies.program, dependencies.messages
    name, ranks = program.name, program.ranks
    channels: dict[tuple[int, int, EdgeKind], list[tuple[int, int]]] = defaultdict(list)
    for (source, sent), (target, received) in messages:
        edge = ranks[target][received].edge
        assert edge is not None, "a RECEIVE names its edge"
        channels[source, target, edge.kind].append((sent, received))
    for (source, target, _), turns in channels.items():
        for due, (sent, received) in zip(sorted(sent for sent, _ in turns), turns, strict=True):
            if sent != due:
                raise ProgramError(
                    f"{name}: {ranks[target][received]} in rank {target} is out of turn: "
                    f"rank {source} comes to {ranks[source][due]}"
                )
    if len(messages) < sum(key[0] is Op.SEND for key in dependencies.places):
        taken = {send for send, _ in messages}
        for key, (rank, position) in dependencies.places.items():
            if key[0] is Op.SEND and (rank, position) not in taken:
                raise ProgramError(f"{name}: {ranks[rank][position]} in rank {rank} is never received")


def _check_end(dependencies: Dependencies, channels: Channels) -> None:
    if stuck := _stuck(dependencies, channels):
        name = dependencies.program.name
        raise ProgramError(f"{name}: with {channels} channels it cannot get past {', '.join(stuck)}")


def _stuck(dependencies: Dependencies, channels: Channels) -> list[str]:
    """Where ranks get no further, and behind what."""
    program, waits = dependencies.program, dependencies.waits(channels)
    ends = advance(program, waits, [[0.0] * len(each) for each in program.ranks], _NO_DELAYS)
    stuck = []
    for rank, instructions in enumerate(program.ranks):
        position = len(ends[rank])
        if position < len(instructions):
            other, at = next(place for place in waits[rank][position] if place[1] >= len(ends[place[0]]))
            stuck.append(f"{instructions[position]} in rank {rank} (after {program.ranks[other][at]} in rank {other})")
    return stuck
