"""Which sequence enters which microbatch on which data-parallel rank. Pure.

    sequences --(longest first, then by name)--> groups of nearly equal tokens --(heaviest first)--> ranks

Results depend on lengths and names alone: never on the order of arrival, on who asks, or when.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

from .errors import DataError


def balance(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Cuts positions into `num_groups` groups of nearly equal sums: longest first, each to the lightest group.

    Needs `num_groups <= len(lengths)`; no group is empty. Positions in a group ascend. Sequences of one length are told
    apart by position: who wants results that do not depend on it sorts them first, as `plan_microbatches` does.
    Takes O(n log `num_groups`). (Longest-processing-time rule: Graham 1969, within 4/3 of the best maximum.)

        balance([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    """
    return _balance(lengths, num_groups)[0]


def _balance(lengths: Sequence[int], num_groups: int) -> tuple[list[list[int]], list[int]]:
    """The groups, and their sums."""
    assert 0 < num_groups <= len(lengths), f"{len(lengths)} sequences cannot fill {num_groups} groups"
    # A group stands in the heap as one number, for speed: its tokens, then its sequences, then its index. So the
    # lightest is on top, and of equals the smallest: sequences of no length spread too.
    bits = len(lengths).bit_length()
    token, sequence, group = 1 << 2 * bits, 1 << bits, (1 << bits) - 1
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # stable: equals stay in order
    groups = [[at] for at in order[:num_groups]]
    heap = [lengths[at] * token + sequence + index for index, at in enumerate(order[:num_groups])]
    heapq.heapify(heap)
    for at in order[num_groups:]:
        lightest = heap[0]
        groups[lightest & group].append(at)
        heapq.heapreplace(heap, lightest + lengths[at] * token + sequence)
    loads = [0] * num_groups
    for each in heap:
        loads[each & group] = each >> 2 * bits
    return [sorted(positions) for positions in groups], loads


def plan_microbatches(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, min_count: int, names: Sequence[str]
) -> list[list[list[int]]]:
    """Positions by `[rank][microbatch]`, for sequences of these lengths and (unique) names.

    Every sequence is in exactly one microbatch, no microbatch is empty or has more than `max_tokens`, and ranks have
    nearly equal tokens. The plan is one of names: another order of arrival gives the same names in the same places.
    In a microbatch the longest comes first, on a rank the heaviest.

    Ranks have the same number of microbatches: at least `min_count` if there are sequences enough, and few more than
    the cap needs. Only where so many sequences are so long that equal numbers were not found (5 of 10 tokens, for 2
    ranks, under a cap of 10), each sequence is a microbatch, and some ranks have one more than others. Replicas bear
    that: each runs a program of its own, and they meet before the first microbatch and after the last.

    Raises `DataError` naming the sequence that is longer than the cap.
    """
    assert len(lengths) >= num_ranks, f"{len(lengths)} sequences for {num_ranks} data-parallel ranks"
    order = sorted(range(len(lengths)), key=names.__getitem__)
    order.sort(key=lengths.__getitem__, reverse=True)  # stable: equals stay in order of their names
    longest_first = [lengths[at] for at in order]
    if longest_first[0] > max_tokens:
        raise DataError(
            "microbatch_tokens",
            max_tokens,
            f"sequence {names[order[0]]} has {longest_first[0]} tokens, and a microbatch holds whole sequences",
            f"set microbatch_tokens to {longest_first[0]} or more",
        )
    ranks = _deal(*_cut(longest_first, num_ranks, max_tokens, min_count), num_ranks)
    return [[[order[at] for at in group] for group in rank] for rank in ranks]


def _cut(
    longest_first: Sequence[int], num_ranks: int, max_tokens: int, min_count: int
) -> tuple[list[list[int]], list[int]]:
    """Groups within the cap, and their sums: equally many for each rank, or one for each sequence."""
    most = len(longest_first) // num_ranks
    per_rank = min(max(min_count, -(-sum(longest_first) // (num_ranks * max_tokens))), most)
    groups, loads = _balance(longest_first, num_ranks * per_rank)
    if max(loads) <= max_tokens:
        return groups, loads
    packed = _best_fit(longest_first, max_tokens)
    per_rank = max(per_rank, -(-len(packed) // num_ranks))
    if per_rank > most:
        return [[at] for at in range(len(longest_first))], list(longest_first)
    groups, loads = _balance(longest_first, num_ranks * per_rank)
    if max(loads) <= max_tokens:
        return groups, loads
    groups = _halve(packed, longest_first, num_ranks * per_rank)
    return groups, [sum(longest_first[at] for at in group) for group in groups]


def _best_fit(longest_first: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Few groups within the cap, not even: longest first, each to the fullest group that has room.

    (Best fit decreasing: Johnson et al. 1974, at most 4 groups more than 11/9 of the fewest.)
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, group), ascending, of groups that can take another sequence
    for at, length in enumerate(longest_first):
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, group = rooms.pop(place)
        else:
            room, group = max_tokens, len(groups)
            groups.append([])
        groups[group].append(at)
        if room - length >= longest_first[-1]:
            insort(rooms, (room - length, group))
    return groups


def _halve(groups: Sequence[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` groups out of fewer: the heaviest that can be cut is cut in two, again and again."""
    done = [group for group in groups if len(group) == 1]
    heap = [(-sum(lengths[at] for at in group), group) for group in groups if len(group) > 1]
    heapq.heapify(heap)
    while len(done) + len(heap) < count:
        _, heaviest = heapq.heappop(heap)
        for half in balance([lengths[at] for at in heaviest], 2):
            group = [heaviest[at] for at in half]
            if len(group) == 1:
                done.append(group)
            else:
                heapq.heappush(heap, (-sum(lengths[at] for at in group), group))
    return done + [group for _, group in heap]


def _deal(groups: Sequence[list[int]], loads: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Groups to ranks, one each in a round, heaviest first: the heaviest of a round to the rank that has least so far.

    So ranks differ by no more tokens than two groups of one round do, or, if the last round is short, than a group has.
    """
    order = sorted(range(len(groups)), key=lambda group: (-loads[group], groups[group]))
    totals = [0] * num_ranks
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(order), num_ranks):
        lightest_first = sorted(range(num_ranks), key=totals.__getitem__)
        for rank, group in zip(
            lightest_first, order[start : start + num_ranks], strict=False
        ):  # the last round is short
            ranks[rank].append(groups[group])
            totals[rank] += loads[group]
    return ranks
