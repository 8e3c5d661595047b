"""Gradients of weights apart from those of inputs: together they are those of one backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainmaster.workers.pipeline.apart import Deferred, deferring


def run(forward, parameters, split: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the input and of parameters, over two microbatches."""
    given, store = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(), Deferred()
    for parameter in parameters:
        parameter.grad = None
    for _ in range(2):
        if not split:
            forward(given).square().sum().backward()
            continue
        with deferring(store):
            out = forward(given)
        out.square().sum().backward()
        store.run()
    return given.grad, [parameter.grad for parameter in parameters]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


square, table, bias, other, frozen = parameter(4, 4), parameter(6, 4), parameter(4), parameter(4, 4), parameter(4, 4)
frozen.requires_grad_(False)
FORWARDS = {
    "one": lambda x: F.linear(x, square, bias),
    "twice": lambda x: F.linear(F.linear(x, square).relu(), square, bias),
    "tied": lambda x: F.linear(x + F.embedding(torch.tensor([[1, 2, 3, 1, 0]]), table), table),
    "made": lambda x: F.linear(x, square * 2 + other),
    "frozen": lambda x: F.linear(F.linear(x, frozen), square),
    "addmm": lambda x: torch.addmm(bias, x.view(-1, 4), square),
    "elsewhere": lambda x: F.linear(x, square) + (x @ square) + square.sum(),
    "module": lambda x: F.linear(x.detach(), square, bias=bias),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_put_off_comes_to_the_same(name: str):
    parameters = [square, table, bias, other, frozen]
    wanted, got = (run(FORWARDS[name], parameters, split) for split in (False, True))
    for one, two in zip([wanted[0], *wanted[1]], [got[0], *got[1]], strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


def test_weights_wait_until_they_are_asked_for():
    square.grad, store = None, Deferred()
    given = torch.ones(1, 2, 4, requires_grad=True)
    with deferring(store):
        out = F.linear(given, square)
    out.sum().backward()
    assert given.grad is not None
    assert square.grad is None
    store.run()
    assert square.grad is not None
    kept = square.grad.clone()
    store.run()
    assert square.grad.equal(kept), "nothing twice"
