from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.rpc.parcels import Parcel, Parcels, Redistribute, StepKind

SAMPLES = Samples(
    ids=("a", "b", "c"),
    keys={
        "tokens": KeyColumn(dtype="int64", lengths=(3, 4, 0)),
        "choices": KeyColumn(dtype="bfloat16", lengths=(2, 3, 4, 1), trailing=(2,), counts=(2, 0, 2)),
    },
)
SENDS = (
    Parcel(peers=(4,), blocks=(SAMPLES.select([0, 2]).only(["tokens"]), SAMPLES.only(["choices"]))),
    Parcel(kind=StepKind.BROADCAST, wave=1, peers=(4, 5), blocks=(SAMPLES.select([1]).only(["tokens"]),)),
)
RECEIVES = (Parcel(kind=StepKind.GATHER, peers=(2,), blocks=(SAMPLES.select([1]).only(["tokens"]),)),)
MADE = Redistribute.of(tag=3, sends=SENDS, receives=RECEIVES)


def wire(parcels: Parcels) -> dict[str, object]:
    return {"numbers": parcels.numbers}


def from_wire(**changes: list[int]) -> Parcels:
    columns = {name: np.array(numbers, np.int32) for name, numbers in changes.items()}
    return TypeAdapter(Parcels).validate_python(wire(Parcels.of(MADE.outgoing.tables._replace(**columns))))


def test_parcels_are_read_as_they_were_made():
    assert MADE.sends == SENDS
    assert MADE.receives == RECEIVES
    assert MADE.ids == ("a", "c", "b")
    assert MADE.outgoing.tables.cells.tolist() == [0, 1, 3, 5, 4, 2]


def test_without_several_sequences_there_are_no_counts():
    assert not len(MADE.incoming.tables.counts)
    assert MADE.incoming.tables.lengths.tolist() == [4]
    assert Redistribute.of(tag=0).sends == ()


def test_blocks_of_several_keys_are_read_as_blocks_of_one():
    (parcel,) = Redistribute.of(tag=0, sends=(Parcel(peers=(1,), blocks=(SAMPLES,)),)).sends
    assert parcel.blocks == (SAMPLES.only(["tokens"]), SAMPLES.only(["choices"]))


def test_one_key_may_have_two_types():
    """Of different samples."""
    other = Samples(ids=("z",), keys={"tokens": KeyColumn(dtype="int32", lengths=(2,))})
    sends = (Parcel(peers=(1,), blocks=(SAMPLES.only(["tokens"]), other)),)
    assert Redistribute.of(tag=0, sends=sends).sends == sends


blocks = st.tuples(st.lists(st.integers(0, 2), unique=True, min_size=1), st.sampled_from(tuple(SAMPLES.keys)))
parcels = st.builds(
    Parcel,
    kind=st.sampled_from(StepKind),
    wave=st.integers(0, 3),
    peers=st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple),
    blocks=st.lists(blocks, min_size=1, max_size=3, unique_by=lambda block: block[1]).map(
        lambda drawn: tuple(SAMPLES.select(positions).only([key]) for positions, key in drawn)
    ),
)


@given(st.lists(parcels, max_size=3).map(tuple), st.lists(parcels, max_size=3).map(tuple))
def test_any_parcels_are_read_as_they_were_made(sends: tuple[Parcel, ...], receives: tuple[Parcel, ...]):
    made = Redistribute.of(tag=0, sends=sends, receives=receives)
    assert (made.sends, made.receives) == (sends, receives)
    assert made == Redistribute.of(tag=0, sends=sends, receives=receives)


def test_equality_is_by_value():
    assert from_wire() == MADE.outgoing
    assert from_wire(waves=[0, 2]) != MADE.outgoing
    assert replace(MADE, tag=4) != MADE
    assert MADE.outgoing != "parcels"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"waves": [0]}, "as many waves, num_peers and num_cells are needed"),
        ({"num_peers": [1, 1]}, "there are 3 peers, where 2 are announced"),
        ({"num_cells": [5, 2]}, "there are 6 cells, where 7 are announced"),
        ({"lengths": [1]}, "there are 1 lengths, where 7 are announced"),
        ({"counts": [7]}, "there are 1 counts of 6 cells"),
        ({"kinds": [0, 4]}, "a kind is below 4"),
        ({"num_peers": [0, 3]}, "a parcel has a peer"),
        ({"cells": [-1, 0, 0, 0, 0, 0]}, "must lie between 0 and"),
    ],
)
def test_tables_from_the_wire_must_fit_together(changes: dict[str, list[int]], rule: str):
    with pytest.raises(ValidationError, match=rule):
        from_wire(**changes)


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ([], "there are 0 numbers, where 8 are announced"),
        ([1, 1, 1], "there are 3 numbers, where 11 are announced"),
        ([2**31 - 1] * 8, "there are 8 numbers, where 17179869184 are announced"),
        ([1, *[0] * 7, 0], "as many waves, num_peers and num_cells are needed"),
        ([-1] * 8, "must lie between 0 and"),
        (np.zeros((8, 1), np.int32), "must be a list of whole numbers"),
    ],
)
def test_numbers_from_the_wire_must_be_tables(numbers: object, rule: str):
    with pytest.raises(ValidationError, match=rule):
        TypeAdapter(Parcels).validate_python({"numbers": numbers})


def test_cells_from_the_wire_must_exist():
    content = {"tag": 0, "ids": ("a",), "keys": (), "outgoing": wire(MADE.outgoing), "incoming": wire(MADE.incoming)}
    with pytest.raises(ValidationError, match="cell 5 of 1 samples with 0 keys"):
        TypeAdapter(Redistribute).validate_python(content)
