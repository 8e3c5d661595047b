"""Programs as data: bytes and back, digests, topologies; and what an import of the pure modules costs."""

import random
import subprocess
import sys
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.errors import ProgramError
from trainmaster.workers.pipeline.instructions import Edge, EdgeKind, Instruction, Op, Program, Stage, chained
from trainmaster.workers.pipeline.lowering import lowered
from trainmaster.workers.pipeline.schedules import Kind, generation, schedule

PURE = ("instructions", "dependencies", "schedules", "lowering", "verify", "simulate", "formulas", "drawing", "report")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    p, m, v = (draw(st.integers(1, most)) for most in (5, 9, 3))
    if draw(st.booleans()):
        kind = draw(st.sampled_from(list(Kind)))
        recompute = draw(st.booleans()) and kind is not Kind.FORWARD
        return lowered(schedule(kind, p, m, v), recompute)
    return lowered(generation(p, draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)), v))


@given(programs())
@settings(max_examples=60, deadline=None)
def test_parse_is_the_inverse_of_serialise(program: Program):
    data = program.serialise()
    parsed = Program.parse(data)
    assert parsed == program
    assert parsed.serialise() == data
    assert parsed.digest == program.digest


@given(programs(), programs())
@settings(max_examples=60, deadline=None)
def test_digests_are_equal_as_programs_are(one: Program, other: Program):
    assert (one == other) == (one.digest == other.digest)


@given(programs(), st.data())
@settings(max_examples=40, deadline=None)
def test_any_change_changes_the_digest(program: Program, data: st.DataObject):
    rank = data.draw(st.sampled_from([rank for rank, each in enumerate(program.ranks) if each]))
    at = data.draw(st.integers(0, len(program.ranks[rank]) - 1))
    each = program.ranks[rank][at]
    changes = [None, replace(each, trip=each.trip + 1), replace(each, microbatch=99), replace(each, is_with_next=True)]
    changed = data.draw(st.sampled_from(changes))
    instructions = [*program.ranks[rank][:at], *([changed] if changed else []), *program.ranks[rank][at + 1 :]]
    other = replace(program, ranks=(*program.ranks[:rank], tuple(instructions), *program.ranks[rank + 1 :]))
    assert other.digest != program.digest
    assert replace(program, name="another").digest != program.digest
    assert replace(program, num_microbatches=100).digest != program.digest


def test_a_program_is_small_on_the_wire():
    assert len(lowered(schedule(Kind.ONE_F_ONE_B, 8, 64)).serialise()) < 50_000


def test_bytes_that_are_no_program_are_refused():
    data = lowered(schedule(Kind.INTERLEAVED, 2, 3, 2)).serialise()
    form, name, m, stages, edges, ranks = msgpack.unpackb(data)
    wrong = [
        b"",
        b"\xc1",
        data[:-1],
        data + b"\x00",
        msgpack.packb(7),
        msgpack.packb([form + 1, name, m, stages, edges, ranks]),
        msgpack.packb([form, 5, m, stages, edges, ranks]),
        msgpack.packb([form, name, "3", stages, edges, ranks]),
        msgpack.packb([form, name, True, stages, edges, ranks]),
        msgpack.packb([form, name, m, [[0, -1], *stages[1:]], edges, ranks]),
        msgpack.packb([form, name, m, stages, [[0, 1, "love"], *edges[1:]], ranks]),
        msgpack.packb([form, name, m, stages, edges, [[["jump", 0, 0, None, 0, False]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["send", None, 0, 99, 0, False]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["send", None, 0, -1, 0, False]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["forward", 0.0, 0, None, 0, False]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["forward", 0, 0, None, 0]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["forward", 0, 0, None, 0, 1]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, [[["forward", 0, 0, None, True, False]], *ranks[1:]]]),
        msgpack.packb([form, name, m, stages, edges, 3]),
    ]
    for each in wrong:
        with pytest.raises(ProgramError, match="are no pipeline program"):
            Program.parse(each)


def test_a_byte_that_changed_is_refused_or_shows_in_the_digest():
    program = lowered(schedule(Kind.ZB_H1, 2, 2))
    data, draws = program.serialise(), random.Random(1)
    for _ in range(2000):
        at = draws.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= draws.randrange(1, 256)
        try:
            parsed = Program.parse(bytes(changed))
        except ProgramError:
            continue
        assert parsed != program
        assert parsed.digest != program.digest


def test_a_chain_a_loop_and_a_v_are_only_places():
    chain, loop, v = chained([0, 1, 2]), chained([0, 1, 0, 1]), chained([0, 1, 1, 0])
    assert chain.stages == (Stage(0, 0, 0), Stage(1, 1, 1), Stage(2, 2, 2))
    assert chain.edges == (
        Edge(0, 0, 1, EdgeKind.ACTIVATION),
        Edge(1, 1, 2, EdgeKind.ACTIVATION),
        Edge(2, 1, 0, EdgeKind.GRADIENT),
        Edge(3, 2, 1, EdgeKind.GRADIENT),
    )
    assert loop.edges == v.edges
    assert [loop.is_local(edge) for edge in loop.edges] == [False] * 6
    assert [v.ends(edge) for edge in v.edges if v.is_local(edge)] == [(1, 1), (1, 1)]
    assert [stage.id for stage in v.stages_of(0)] == [0, 3]
    assert (loop.num_ranks, loop.num_replica_groups) == (2, 4)
    assert chain.into(1, EdgeKind.GRADIENT) == (chain.edges[3],)
    assert chain.out_of(1, EdgeKind.GRADIENT) == (chain.edges[2],)


def test_tokens_come_home_in_generation():
    ring = chained([0, 1], is_generating=True)
    assert ring.edges == (Edge(0, 0, 1, EdgeKind.ACTIVATION), Edge(1, 1, 0, EdgeKind.TOKEN))
    assert ring.is_generating
    assert not chained([0, 1]).is_generating


def test_an_instruction_says_what_it_is():
    edge = Edge(0, 0, 1, EdgeKind.ACTIVATION)
    assert str(Instruction(Op.WEIGHT_GRADIENT, 3, 7)) == "weight_gradient(3, microbatch 7)"
    assert str(Instruction(Op.SEND, None, 7, edge)) == "send(activation 0->1, microbatch 7)"
    assert str(Instruction(Op.FORWARD, 0, 1, trip=4)) == "forward(0, microbatch 1, trip 4)"
    assert str(Instruction(Op.REDUCE, 2)) == "reduce(2)"
    assert str(Instruction(Op.STEP)) == "step"


def test_programs_are_made_without_torch():
    script = "import importlib, sys\n"
    script += f"for name in {PURE!r}: importlib.import_module('trainmaster.workers.pipeline.' + name)\n"
    script += "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
