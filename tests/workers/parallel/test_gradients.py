"""Sums of gradients over a group."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from trainmaster.workers.parallel.gradients import all_reduce_gradients


@dataclass
class Pair:
    """A group of two: the first notes what it would send, the second gets the sum."""

    sent: list[Tensor] = field(default_factory=list)
    is_second: bool = False
    num_messages: int = 0

    def all_reduce(self, tensor: Tensor) -> None:
        if self.is_second:
            tensor += self.sent[self.num_messages]
        else:
            self.sent.append(tensor.clone())
        self.num_messages += 1


def parameters(gradients: list[float | None], dtype: torch.dtype) -> list[nn.Parameter]:
    made = []
    for at, value in enumerate(gradients):
        parameter = nn.Parameter(torch.ones(at + 1, 2, dtype=dtype))
        parameter.grad_dtype = torch.float32
        parameter.grad = None if value is None else torch.full((at + 1, 2), float(value))
        made.append(parameter)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_member_lacks_counts_as_zeros_and_what_all_lack_stays_away(dtype: torch.dtype) -> None:
    first, second = parameters([1, 2, None, None], dtype), parameters([4, None, 8, None], dtype)
    group = Pair()
    all_reduce_gradients(first, group)
    there = Pair(group.sent, is_second=True)
    all_reduce_gradients(second, there)
    assert there.num_messages == 1, "one message a type"
    assert [None if each.grad is None else each.grad.unique().tolist() for each in second] == [[5], [2], [8], None]
    assert all(each.grad is None or each.grad.dtype is torch.float32 for each in second)
