import pytest
import torch
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.workers.data.store import Store, describe


def filled() -> tuple[Store, Samples]:
    values = {
        "tokens": [torch.tensor([1, 2, 3]), torch.tensor([4])],
        "values": [torch.ones(3, 2, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)],
    }
    store = Store()
    for key, tensors in values.items():
        for sequence, tensor in zip("ab", tensors, strict=True):
            store.put(sequence, key, tensor)
    return store, describe(values, "ab")


def test_values_are_described_without_their_content():
    _, samples = filled()
    assert samples == Samples(
        ids=("a", "b"),
        keys={
            "tokens": KeyColumn(dtype="int64", lengths=(3, 1)),
            "values": KeyColumn(dtype="bfloat16", lengths=(3, 1), trailing=(2,)),
        },
    )


def test_packed_values_follow_the_order_of_the_samples():
    store, samples = filled()
    assert store.packed(samples, "tokens").tolist() == [1, 2, 3, 4]
    assert store.packed(samples.select([1, 0]), "tokens").tolist() == [4, 1, 2, 3]
    assert store.packed(samples, "values").shape == (4, 2)


def test_release_forgets_every_key_of_a_sequence():
    store, _ = filled()
    assert len(store) == 4
    store.release(["a", "unknown"])
    assert len(store) == 2
    assert store.get("b", "tokens").tolist() == [4]
    with pytest.raises(AssertionError, match="the plan says that this worker holds tokens of a"):
        store.get("a", "tokens")


def test_a_microbatch_has_tokens_and_the_keys_that_were_asked_for():
    store, samples = filled()
    microbatch = store.microbatch(samples, ["values"], torch.device("cpu"))
    assert microbatch.tokens.tolist() == [[1, 2, 3, 4]]
    assert microbatch.num_tokens == 4
    assert set(microbatch.keys) == {"values"}
    assert microbatch.keys["values"].shape == (4, 2)
