import gc
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
from exchange import (
    KEYS,
    NUM_WORKERS,
    Move,
    groups_in_threads,
    packed,
    plan,
    plans,
    raw,
    run_in_processes,
    run_in_threads,
    samples,
    store_with,
    value,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trainmaster.api.errors import PeerLost
from trainmaster.system.rpc.parcels import Parcel, StepKind
from trainmaster.workers.data.store import Store, describe
from trainmaster.workers.data.transfer import redistribute
from trainmaster.workers.parallel.groups import Group

Post = dict[tuple[int, int, int], deque[Tensor]]
ALL = tuple(KEYS)


@dataclass
class Under:
    """Something under way."""

    action: "object" = None
    is_waited_for: bool = False

    def wait(self) -> None:
        self.is_waited_for = True
        if callable(self.action):
            self.action()


@dataclass
class Loopback:
    """A group whose messages lie in a shared post box, by (source, target, tag), until they are received."""

    rank: int
    post: Post
    sendings: list[Under] = field(default_factory=list)

    def send(self, tensor: Tensor, to: int, tag: int) -> Under:
        assert tensor.is_contiguous()
        self.post.setdefault((self.rank, to, tag), deque()).append(tensor)
        self.sendings.append(Under())
        return self.sendings[-1]

    def expect(self, tensor: Tensor, source: int, tag: int) -> Under:
        def receive() -> None:
            sent = self.post[source, self.rank, tag].popleft()
            assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(sent)

        return Under(receive)


@pytest.fixture(scope="module")
def groups() -> Iterator[list[Group]]:
    with groups_in_threads() as joined:
        yield joined


def all_values(ids: list[str], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(sequence, key) for sequence in ids for key in keys]


def check(store: Store, expected: set[tuple[str, str]]) -> None:
    """Bit for bit, and nothing else."""
    for sequence, key in expected:
        found, right = store.get(sequence, key), value(sequence, key)
        assert (found.dtype, found.shape, raw(found)) == (right.dtype, right.shape, raw(right)), f"{key} of {sequence}"
    assert len(store) == len(expected)


# -- parcels ----------------------------------------------------------------------------------------------------------


def sent(store: Store, *blocks: object) -> Tensor:
    post: Post = {}
    redistribute(plan(5, sends=[Parcel(peers=(1,), blocks=blocks)]), store, Loopback(0, post))
    ((address, (buffer,)),) = post.items()
    assert address == (0, 1, 5)
    return buffer


def test_a_parcel_is_one_buffer_without_padding():
    store = store_with(all_values(["a", "b", "c"], ALL))
    buffer = sent(store, samples(["a", "c"], ALL), samples(["b"], ("mask", "tokens")))
    values = all_values(["a", "c"], ALL) + all_values(["b"], ("mask", "tokens"))
    assert (buffer.shape, buffer.dtype) == ((sum(value(*each).nbytes for each in values),), torch.uint8)


def test_wider_types_come_first_so_that_all_are_aligned():
    store = store_with(all_values(["a", "b"], ("mask", "tokens", "exact")))
    buffer = sent(store, samples(["a"], ("mask", "tokens")), samples(["b"], ("mask", "exact")))
    expected = [value("a", "tokens"), value("b", "exact"), value("a", "mask"), value("b", "mask")]
    assert raw(buffer) == b"".join(map(raw, expected))


def test_a_broadcast_is_packed_once_and_every_send_is_waited_for():
    post: Post = {}
    group = Loopback(0, post)
    block = samples(["a"], ALL)
    redistribute(plan(1, sends=[Parcel(peers=(1, 2, 3), blocks=(block,))]), store_with(all_values(["a"], ALL)), group)
    assert len({queue[0].data_ptr() for queue in post.values()}) == 1
    assert sorted(post) == [(0, peer, 1) for peer in (1, 2, 3)]
    assert all(sending.is_waited_for for sending in group.sendings)


class PagesOfOneSize(mmap.mmap):
    def madvise(self, *_: int) -> None:
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("pages", [mmap.mmap, PagesOfOneSize])
def test_a_large_parcel_lies_in_huge_pages_where_there_are_any(monkeypatch: pytest.MonkeyPatch, pages: type[mmap.mmap]):
    monkeypatch.setattr(mmap, "mmap", pages)
    tokens = torch.arange(3 * 2**18)
    block = describe({"tokens": [tokens]}, ["a"])
    store = Store()
    store.put("a", "tokens", tokens)
    buffer = sent(store, block)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert torch.equal(buffer.view(torch.int64), tokens)


def test_a_value_that_is_a_view_is_sent_as_its_own_part():
    store, wide = Store(), value("a", "exact").new_ones(6, 4).cumsum(0)
    length = len(value("a", "exact"))
    store.put("a", "exact", wide[1 : 1 + length, 1:2])
    assert raw(sent(store, samples(["a"], ("exact",)))) == raw(wide[1 : 1 + length, 1:2])


def test_several_parcels_of_one_pair_are_received_in_the_order_of_their_waves():
    post: Post = {}
    first, second = (Parcel(peers=(1,), blocks=(samples([each], ALL),), wave=wave) for wave, each in enumerate("ab"))
    redistribute(plan(1, sends=[second, first]), store_with(all_values(["a", "b"], ALL)), Loopback(0, post))
    receiver = Store()
    receives = [Parcel(peers=(0,), blocks=parcel.blocks, wave=parcel.wave) for parcel in (second, first)]
    redistribute(plan(1, receives=receives), receiver, Loopback(1, post))
    check(receiver, set(all_values(["a", "b"], ALL)))


def test_what_a_worker_passes_on_it_waits_for_and_for_nothing_else():
    """The parcel of "late" has not come when "a" is passed on."""
    post: Post = {(0, 1, 1): deque([sent(store_with(all_values(["a"], ALL)), samples(["a"], ALL))])}
    waited: list[str] = []

    class Relay(Loopback):
        def expect(self, tensor: Tensor, source: int, tag: int) -> Under:
            if source != 3:
                return super().expect(tensor, source, tag)
            return Under(lambda: waited.append(f"{sorted(self.post)} are under way"))

    late = samples(["late"], ("mask",))
    receives = [Parcel(peers=(3,), blocks=(late,)), Parcel(peers=(0,), blocks=(samples(["a"], ALL),))]
    sends = [Parcel(peers=(2,), blocks=(samples(["a"], ALL),), wave=1)]
    redistribute(plan(1, sends=sends, receives=receives), Store(), Relay(1, post))
    assert waited == ["[(0, 1, 1), (1, 2, 1)] are under way"]
    assert raw(post[1, 2, 1][0]) == raw(sent(store_with(all_values(["a"], ALL)), samples(["a"], ALL)))


def test_sending_what_is_not_held_is_our_own_mistake():
    with pytest.raises(AssertionError, match="the plan says that this worker holds tokens of a"):
        sent(Store(), samples(["a"], ("tokens",)))


@pytest.mark.parametrize("wrong", [torch.zeros(9, dtype=torch.int32), torch.zeros(9, 2), torch.zeros(8)])
def test_sending_what_is_not_as_planned_is_our_own_mistake(wrong: Tensor):
    store = Store()
    store.put("a", "logprobs", wrong)
    with pytest.raises(AssertionError, match=r"logprobs of a is torch.*, but the plan says torch.float32 \["):
        sent(store, samples(["a"], ("logprobs",)))


# -- workers in threads -----------------------------------------------------------------------------------------------

Plan = tuple[list[Move], list[set[tuple[str, str]]]]
"""Moves, and what each worker holds before them."""


@st.composite
def random_plans(draw: st.DrawFn) -> Plan:
    """Any moves of what a worker held before a wave to workers that lack it, in any order."""
    ids = [f"s{at}" for at in range(draw(st.integers(1, 4)))]
    keys = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=4, unique=True))
    ranks = st.integers(0, NUM_WORKERS - 1)
    held: list[set[tuple[str, str]]] = [set() for _ in range(NUM_WORKERS)]
    for each in all_values(ids, tuple(keys)):
        held[draw(ranks)].add(each)
    before, moves = [set(each) for each in held], []
    for wave in range(draw(st.integers(1, 3))):
        start = [set(each) for each in held]
        for _ in range(draw(st.integers(0, 5))):
            source = draw(ranks)
            chosen_ids = draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
            chosen_keys = draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
            values = set(all_values(chosen_ids, tuple(chosen_keys)))
            targets = [rank for rank in range(NUM_WORKERS) if rank != source and not values & held[rank]]
            if targets and values <= start[source]:
                targets = draw(st.lists(st.sampled_from(targets), min_size=1, unique=True))
                cut = draw(st.integers(0, len(chosen_ids)))
                parts = [part for part in (chosen_ids[:cut], chosen_ids[cut:]) if part]
                blocks = tuple(samples(part, chosen_keys) for part in parts)
                moves.append(Move(source, tuple(targets), blocks, wave, draw(st.sampled_from(StepKind))))
                for target in targets:
                    held[target] |= values
    return draw(st.permutations(moves)), before


@settings(max_examples=60)
@given(random_plans(), st.integers(0, 2**30 - 1))
def test_any_plan_ends_and_every_value_arrives_bit_for_bit(groups: list[Group], drawn: Plan, tag: int):
    moves, held = drawn
    stores = [store_with(sorted(each)) for each in held]
    run_in_threads(plans(moves, tag), stores, groups)
    for rank, store in enumerate(stores):
        received = [move.values for move in moves if rank in move.targets]
        check(store, held[rank].union(*received))


def test_redistributions_with_different_tags_run_at_once(groups: list[Group]):
    """As those of two lanes do: here the workers take them in opposite orders."""
    ids = [[f"first/{rank}" for rank in range(NUM_WORKERS)], [f"second/{rank}" for rank in range(NUM_WORKERS)]]
    stores = [store_with([value for part in ids for value in all_values([part[rank]], ALL)]) for rank in range(4)]
    lanes = []
    for tag, part in enumerate(ids):
        others = [tuple(each for each in range(NUM_WORKERS) if each != rank) for rank in range(NUM_WORKERS)]
        moves = [Move(rank, others[rank], (samples([part[rank]], ALL),)) for rank in range(NUM_WORKERS)]
        lanes.append(threading.Thread(target=run_in_threads, args=(plans(moves, tag), stores, groups)))
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    for store in stores:
        check(store, set(all_values([each for part in ids for each in part], ALL)))


@dataclass
class Watched:
    """A group that remembers the memory of its messages."""

    group: Group
    memory: list["weakref.ref[torch.UntypedStorage]"]

    def send(self, tensor: Tensor, to: int, tag: int) -> object:
        self.memory.append(weakref.ref(tensor.untyped_storage()))
        return self.group.send(tensor, to, tag)

    def expect(self, tensor: Tensor, source: int, tag: int) -> object:
        self.memory.append(weakref.ref(tensor.untyped_storage()))
        return self.group.expect(tensor, source, tag)


def test_nothing_is_left_of_a_redistribution_but_what_the_stores_hold(groups: list[Group]):
    ids = [f"s{at}" for at in range(8)]
    block = samples(ids, ALL)
    moves = [Move(0, (1, 2), (block,)), Move(2, (3,), (block,), wave=1)]
    stores = [store_with(all_values(ids, ALL)), Store(), Store(), Store()]
    memory: list[weakref.ref[torch.UntypedStorage]] = []
    run_in_threads(plans(moves, 3), stores, [Watched(group, memory) for group in groups])
    gc.collect()
    assert len(memory) == 6
    assert sum(each() is not None for each in memory) == 3, "one for each worker that received"
    for rank, left in ((1, 2), (2, 1), (3, 0)):
        stores[rank].release(ids)
        gc.collect()
        assert (len(stores[rank]), sum(each() is not None for each in memory)) == (0, left)


def test_a_peer_that_does_not_come_is_named(groups: list[Group]):
    impatient = Group("transfer", (0, 1, 2, 3), 0, groups[0].backend, timedelta(seconds=0.2))
    parcel = Parcel(peers=(1,), blocks=(samples(["a"], ("tokens",)),))
    with pytest.raises(PeerLost, match=r"receive in group transfer of workers \[0, 1, 2, 3\]"):
        redistribute(plan(2**30 - 1, receives=[parcel]), Store(), impatient)


# -- workers in processes ---------------------------------------------------------------------------------------------


def steps(sources: list[int], targets: list[int]) -> list[list[Move]]:
    """Every kind of step between two meshes; a broadcast of two waves, in which one that received passes on."""
    last = targets[-1]
    own = {rank: [f"of-{rank}/{at}" for at in range(3)] for rank in sources}
    return [
        [
            Move(one, (other,), (samples(own[one], ALL),), kind=StepKind.DIRECT)
            for one, other in zip(sources, targets, strict=True)
            if one != other
        ],
        [Move(one, (last,), (samples(own[one], ALL),), kind=StepKind.GATHER) for one in sources if one != last],
        [
            Move(sources[0], (other,), (samples([own[sources[0]][at]], ALL),), kind=StepKind.SCATTER)
            for at, other in enumerate(targets)
            if other != sources[0]
        ],
        [
            Move(sources[0], tuple(targets[:-1]), (samples(own[sources[0]], ALL),), kind=StepKind.BROADCAST),
            Move(targets[0], (last,), (samples(own[sources[0]], ALL),), wave=1, kind=StepKind.BROADCAST),
        ],
    ]


def test_processes_move_every_type_through_every_kind_of_step_between_any_meshes():
    moves = [*steps([0, 1], [2, 3]), *steps([0, 1, 2], [1, 2, 3]), *steps([3, 0], [1, 2])]
    held = [all_values([f"of-{rank}/{at}" for at in range(3)], ALL) for rank in range(NUM_WORKERS)]
    found = run_in_processes([plans(each, tag) for tag, each in enumerate(moves)], held)
    for step, by_worker in zip(moves, found, strict=True):
        for rank, received in enumerate(by_worker):
            expected = set().union(*(move.values for move in step if rank in move.targets))
            assert {(sequence, key) for sequence, keys in received.items() for key in keys} == expected
            for sequence, key in expected:
                assert received[sequence][key] == raw(value(sequence, key)), f"{key} of {sequence} on {rank}"
    kinds = {move.kind for step in moves for move in step}
    assert kinds == set(StepKind)
    assert packed(["of-0/0", "of-0/1", "of-0/2"], ALL).samples.sizes("tokens") != (0, 0, 0)
