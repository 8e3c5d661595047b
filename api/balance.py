"""Which sequence enters which microbatch on which data-parallel rank. Pure.

Results depend on lengths and order alone, never on who asks or when.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from .errors import DataError


def balance(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Cuts positions into `num_groups` groups of nearly equal sums: longest first, each to the lightest group.

    Needs `num_groups <= len(lengths)`; no group is empty. Positions in a group ascend. (Longest-processing-time rule:
    Graham 1969, within 4/3 of the best maximum.)
    """
    assert 0 < num_groups <= len(lengths), f"{len(lengths)} sequences cannot fill {num_groups} groups"
    # a group's size breaks ties, so that sequences of no length spread too
    heap = [(0, 0, group) for group in range(num_groups)]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        load, size, group = heapq.heappop(heap)
        groups[group].append(at)
        heapq.heappush(heap, (load + lengths[at], size + 1, group))
    return [sorted(group) for group in groups]


def plan_microbatches(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, min_count: int, names: Sequence[str]
) -> list[list[list[int]]]:
    """Positions by `[rank][microbatch]`, for sequences of these lengths.

    Every sequence is in exactly one microbatch, no microbatch is empty or has more than `max_tokens`, and ranks have
    nearly equal tokens. Ranks have the same number of microbatches, at least `min_count`, wherever the number of
    sequences and the cap allow it; otherwise their numbers differ by one.

    Raises `DataError` naming the sequence (by `names`) that is longer than the cap.
    """
    assert len(lengths) >= num_ranks, f"{len(lengths)} sequences for {num_ranks} data-parallel ranks"
    longest = max(range(len(lengths)), key=lambda at: lengths[at])
    if lengths[longest] > max_tokens:
        raise DataError(
            "microbatch_tokens",
            max_tokens,
            f"sequence {names[longest]} has {lengths[longest]} tokens, and a microbatch holds whole sequences",
            f"set microbatch_tokens to {lengths[longest]} or more",
        )
    per_rank = max(min_count, -(-sum(lengths) // (num_ranks * max_tokens)))
    count = num_ranks * min(per_rank, len(lengths) // num_ranks)
    groups = balance(lengths, count)
    while max(_loads(groups, lengths)) > max_tokens:
        count = count + num_ranks if count + num_ranks <= len(lengths) else len(lengths)
        groups = balance(lengths, count)
    return _deal(groups, _loads(groups, lengths), num_ranks)


def _loads(groups: Iterable[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[at] for at in group) for group in groups]


def _deal(groups: list[list[int]], loads: list[int], num_ranks: int) -> list[list[list[int]]]:
    """Groups to ranks, heaviest first, back and forth (0 1 2, 2 1 0, ...), which evens the ranks out."""
    order = sorted(range(len(groups)), key=lambda group: (-loads[group], group))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, group in enumerate(order):
        lap, at = divmod(turn, num_ranks)
        ranks[at if lap % 2 == 0 else num_ranks - 1 - at].append(groups[group])
    return [sorted(rank) for rank in ranks]
