"""The KV cache by itself, and passes with it against whole models without."""

import pytest
import torch
from model_checks import check_decode
from trainmaster.workers.models.attention import PackedPass
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.models.kernels import Scores, attend, attend_cached
from trainmaster.workers.pipeline.slots import compacted

CPU = torch.device("cpu")


def test_a_cache_gives_back_what_was_written_after_any_compaction():
    source = torch.Generator().manual_seed(0)
    cache, place = KVCache(num_rows=3, max_length=6), (0, 0)
    rows = [[], [], []]  # of [1, K, 1, D] each

    def write(current):
        key = torch.randn(1, 2, current.batch.num_tokens, 4, generator=source)
        keys, values = cache.write(place, key, key[..., :3], current.slots)
        for row, part in enumerate(key.split(current.batch.seqlens, 2)):
            rows[row].append(part)
        assert keys.shape == (len(rows), 2, max(cache.lengths), 4)
        assert torch.equal(keys[..., :3], values)
        for row, (length, parts) in enumerate(zip(cache.lengths, rows, strict=True)):
            assert torch.equal(keys[row : row + 1, :, :length], torch.cat(parts, 2))

    write(PackedPass.prefill(cache, (3, 1, 2), CPU))
    write(PackedPass.decode(cache, CPU))
    assert cache.lengths == (4, 2, 3)
    cache.keep([2, 1])
    rows = [rows[2], rows[1]]
    write(PackedPass.decode(cache, CPU))
    assert cache.lengths == (4, 3)
    cache.keep([1])
    rows = [rows[1]]
    write(PackedPass.decode(cache, CPU))
    assert cache.lengths == (4,)
    cache.keep([])
    assert cache.lengths == ()


def test_a_cache_holds_no_more_than_was_reserved():
    cache = KVCache(num_rows=2, max_length=3)
    with pytest.raises(AssertionError, match="3 sequences in a cache of 2 rows"):
        PackedPass.prefill(cache, (1, 1, 1), CPU)
    with pytest.raises(AssertionError, match="4 tokens in a row of 3"):
        PackedPass.prefill(cache, (4, 1), CPU)


def test_a_layer_may_attend_twice_in_one_pass():
    cache = KVCache(num_rows=1, max_length=2)
    current = PackedPass.prefill(cache, (2,), CPU)
    first, second = torch.randn(2, 1, 1, 2, 4)
    cache.write((0, 0), first, first, current.slots)
    keys, _ = cache.write((0, 1), second, second, current.slots)
    assert torch.equal(keys, second)
    assert torch.equal(cache.write((0, 0), first, first, current.slots)[0], first)


def test_positions_of_passes():
    cache = KVCache(num_rows=2, max_length=5)
    assert PackedPass.prefill(cache, (3, 2), CPU).batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    current = PackedPass.decode(cache, CPU)
    assert current.batch.position_ids.tolist() == [[3, 2]]
    assert current.num_decoding == 2
    assert not current.is_uniform
    cache.keep([1])
    assert PackedPass.decode(cache, CPU).is_uniform


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_size", [8, 6])
@pytest.mark.parametrize("lengths", [(5, 2, 7), (4, 4, 4)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_cached_token_attends_as_the_last_of_its_sequence(softcap, with_sinks, value_size, lengths, window):
    source = torch.Generator().manual_seed(0)
    scores = Scores(0.4, softcap, torch.randn(4, generator=source) if with_sinks else None)
    keys, values = torch.zeros(3, 2, 7, 8), torch.zeros(3, 2, 7, value_size)
    queries, wanted = [], []
    for row, length in enumerate(lengths):
        query, key, value = (
            torch.randn(1, heads, length, size, generator=source) for heads, size in ((4, 8), (2, 8), (2, value_size))
        )
        index = torch.arange(length)
        seen = (index[:, None] >= index) & (index[:, None] - index < (window or length))
        wanted.append(attend(query, key, value, seen[None, None], scores)[:, :, -1:])
        queries.append(query[:, :, -1:])
        keys[row, :, :length], values[row, :, :length] = key[0], value[0]
    longest, ends = max(lengths), torch.tensor(lengths)[:, None, None, None]
    index = torch.arange(longest)
    mask = (index < ends) & (index >= ends - (window or longest))
    got = attend_cached(torch.cat(queries, 2), keys[:, :, :longest], values[:, :, :longest], mask, scores)
    torch.testing.assert_close(got, torch.cat(wanted, 2).transpose(1, 2), atol=1e-5, rtol=1e-5)


# lengths of prompts: mixed, all ends at different times; or equal, and beyond the window at once or later
@pytest.mark.parametrize("prompts", [(2, 12, 1, 7), (4, 4, None, 4), (None, 11, None, 11)])
def test_cached_passes_equal_the_whole_model(whole, make_stages, num_stages, prompts):
    stages, microbatch = make_stages(num_stages), whole.microbatches[0]
    ids, logits = [document[0] for document in microbatch.documents], microbatch.logits[0].split(microbatch.lengths)
    live = [(ids[place], logits[place], length) for place, length in enumerate(prompts) if length is not None]
    caches = [KVCache(len(live), max(len(tokens) for tokens, _, _ in live)) for _ in stages]

    def check(row, passes):
        hidden = None
        for stage, current in zip(stages, passes, strict=True):
            hidden = stage.run(row[None], current, hidden)
        got = stages[-1].logits(hidden)[0]
        wanted = torch.cat(
            [all_logits[end - size : end] for size, (_, all_logits, end) in zip(sizes, live, strict=True)]
        )
        assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())

    with torch.inference_mode():
        sizes = tuple(length for _, _, length in live)
        check(
            torch.cat([tokens[:length] for tokens, _, length in live]),
            [PackedPass.prefill(cache, sizes, CPU) for cache in caches],
        )
        while True:
            is_live = [length < len(tokens) for tokens, _, length in live]
            order = compacted(is_live)
            if not order:
                break
            for cache in caches:
                cache.keep(order)
            live = [(tokens, wanted, length + 1) for tokens, wanted, length in (live[row] for row in order)]
            sizes = (1,) * len(live)
            row = torch.stack([tokens[length - 1] for tokens, _, length in live])
            check(row, [PackedPass.decode(cache, CPU) for cache in caches])


def test_sequences_join_those_that_decode(whole, make_stages, num_stages):
    """One pass of rows that go on and of others that join, in the place of some that have ended."""
    check_decode(make_stages, whole, num_stages)
