import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trainmaster.api.batch import Samples
from trainmaster.system.rpc.commands import Parcel, Redistribute
from trainmaster.workers.data.store import Store, describe
from trainmaster.workers.data.transfer import redistribute

Post = dict[tuple[int, int, int], deque[Tensor]]


class FakeSending:
    def __init__(self) -> None:
        self.is_waited_for = False

    def wait(self) -> None:
        self.is_waited_for = True


class Loopback:
    """A group whose messages lie in a shared post box, by (source, target, tag), until they are received."""

    def __init__(self, rank: int, post: Post) -> None:
        self.rank, self.post = rank, post
        self.sendings: list[FakeSending] = []

    def send(self, tensor: Tensor, to: int, tag: int) -> FakeSending:
        assert tensor.is_contiguous()
        self.post.setdefault((self.rank, to, tag), deque()).append(tensor)
        self.sendings.append(FakeSending())
        return self.sendings[-1]

    def receive(self, tensor: Tensor, source: int, tag: int) -> None:
        sent = self.post[source, self.rank, tag].popleft()
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)


def put(store: Store, ids: list[str], values: dict[str, list[Tensor]]) -> Samples:
    for key, tensors in values.items():
        for sequence, tensor in zip(ids, tensors, strict=True):
            store.put(sequence, key, tensor)
    return describe(values, ids)


def transferred(ids: list[str], values: dict[str, list[Tensor]]) -> tuple[Store, Post]:
    """What arrives at worker 1 when worker 0 sends everything."""
    post: Post = {}
    sender, receiver = Store(), Store()
    samples = put(sender, ids, values)
    redistribute(Redistribute(tag=5, sends=(Parcel(peers=(1,), blocks=(samples,)),)), sender, Loopback(0, post))
    sent = {address: deque(queue) for address, queue in post.items()}
    redistribute(Redistribute(tag=5, receives=(Parcel(peers=(0,), blocks=(samples,)),)), receiver, Loopback(1, post))
    return receiver, sent


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, not-a-numbers too."""
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


VALUES = {
    "mask": [torch.tensor([True, False, True]), torch.tensor([False])],
    "tokens": [torch.tensor([2**24 + 1, 2**53 + 1, -1]), torch.tensor([2**62])],
    "half": [torch.randn(3, 5).to(torch.bfloat16), torch.full((1, 5), float("nan"), dtype=torch.bfloat16)],
    "logprobs": [torch.tensor([0.1, -float("inf"), 3.0]), torch.tensor([1e-30])],
    "routing": [torch.arange(3 * 2 * 3, dtype=torch.int16).view(3, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int16)],
    "value": [torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64), torch.tensor([[1 / 3]], dtype=torch.float64)],
}


def test_values_of_all_types_and_shapes_arrive_bit_for_bit():
    receiver, _ = transferred(["a", "b"], VALUES)
    for key, tensors in VALUES.items():
        for sequence, tensor in zip(["a", "b"], tensors, strict=True):
            assert same(receiver.get(sequence, key), tensor), f"{key} of {sequence}"


def test_a_parcel_is_one_buffer_without_padding():
    _, sent = transferred(["a", "b"], VALUES)
    ((address, (buffer,)),) = sent.items()
    assert address == (0, 1, 5)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensors in VALUES.values() for tensor in tensors)
    assert (buffer.shape, buffer.dtype) == ((num_bytes,), torch.uint8)


def test_each_value_has_its_own_memory():
    """Else one sequence would keep the whole parcel alive."""
    receiver, _ = transferred(["a", "b"], VALUES)
    for key in VALUES:
        value = receiver.get("b", key)
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_value_that_is_a_view_is_sent_as_its_own_part():
    wide = torch.arange(24).view(6, 4)
    receiver, _ = transferred(["a"], {"tokens": [wide[1:5, 1]], "pairs": [wide.t()[:, ::2]]})
    assert same(receiver.get("a", "tokens"), torch.tensor([5, 9, 13, 17]))
    assert same(receiver.get("a", "pairs"), wide.t()[:, ::2].contiguous())


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
]
columns = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 3), max_size=2))


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.lists(columns, min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_any_mix_arrives_bit_for_bit(lengths: list[int], kinds: list[tuple[torch.dtype, list[int]]], seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = [f"s{at}" for at in range(len(lengths))]
    values = {}
    for at, (dtype, trailing) in enumerate(kinds):
        values[f"key{at}"] = []
        for length in lengths:
            num_bytes = length * math.prod(trailing) * dtype.itemsize
            top = 2 if dtype is torch.bool else 256
            raw = torch.randint(0, top, (num_bytes,), dtype=torch.uint8, generator=generator)
            values[f"key{at}"].append(raw.view(dtype).view(length, *trailing))
    receiver, _ = transferred(ids, values)
    for key, tensors in values.items():
        for sequence, tensor in zip(ids, tensors, strict=True):
            assert same(receiver.get(sequence, key), tensor)


def test_both_ways_at_once_and_every_send_is_waited_for():
    post: Post = {}
    stores, groups = [Store(), Store()], [Loopback(0, post), Loopback(1, post)]
    parts = [put(stores[rank], [f"s{rank}"], {"tokens": [torch.tensor([rank, 7])]}) for rank in (0, 1)]
    for rank in (0, 1):
        redistribute(
            Redistribute(tag=1, sends=(Parcel(peers=(1 - rank,), blocks=(parts[rank],)),)), stores[rank], groups[rank]
        )
    for rank in (0, 1):
        plan = Redistribute(tag=1, receives=(Parcel(peers=(1 - rank,), blocks=(parts[1 - rank],)),))
        redistribute(plan, stores[rank], groups[rank])
        assert stores[rank].get(f"s{1 - rank}", "tokens").tolist() == [1 - rank, 7]
    assert all(sending.is_waited_for for group in groups for sending in group.sendings)
    assert not any(post.values())


def test_several_parcels_of_one_pair_keep_their_order():
    post: Post = {}
    sender, receiver = Store(), Store()
    first = put(sender, ["a"], {"tokens": [torch.tensor([1, 2])]})
    second = put(sender, ["b"], {"tokens": [torch.tensor([3])], "mask": [torch.tensor([True])]})
    sends = tuple(Parcel(peers=(1,), blocks=(samples,)) for samples in (first, second))
    receives = tuple(Parcel(peers=(0,), blocks=(samples,)) for samples in (first, second))
    redistribute(Redistribute(tag=1, sends=sends), sender, Loopback(0, post))
    redistribute(Redistribute(tag=1, receives=receives), receiver, Loopback(1, post))
    assert receiver.get("a", "tokens").tolist() == [1, 2]
    assert receiver.get("b", "mask").tolist() == [True]


def test_sending_what_is_not_held_is_our_own_mistake():
    samples = put(Store(), ["a"], {"tokens": [torch.tensor([1])]})
    with pytest.raises(AssertionError, match="the plan says that this worker holds tokens of a"):
        redistribute(Redistribute(tag=1, sends=(Parcel(peers=(1,), blocks=(samples,)),)), Store(), Loopback(0, {}))
