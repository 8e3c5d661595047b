import pytest
import torch
from torch import nn
from trainmaster.api.errors import ModelError
from trainmaster.workers.blending import blend


class Tiny(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, width, generator=generator).to(dtype))
        self.tied = self.weight
        self.register_buffer("running", torch.randn(4, generator=generator).to(dtype))
        self.register_buffer("hidden", torch.randn(2, generator=generator).to(dtype), persistent=False)
        self.register_buffer("count", torch.tensor(seed))


def values(module: Tiny) -> dict[str, torch.Tensor]:
    names = ("weight", "running", "hidden", "count")
    return {name: getattr(module, name).detach().clone() for name in names}


@pytest.mark.parametrize("eta", [0.3, 0.5, 0.9, 1e-3])
def test_each_tensor_moves_by_the_closed_form_and_the_source_stays(eta: float):
    source, target = Tiny(1), Tiny(2)
    given, before, pointer = values(source), values(target), target.weight.data_ptr()
    blend(source, target, eta)
    after = values(target)
    for name in ("weight", "running", "hidden"):
        wanted = eta * given[name].double() + (1 - eta) * before[name].double()
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert after["count"] == given["count"], "a whole number is copied"
    assert all(values(source)[name].equal(given[name]) for name in given)
    assert target.weight.data_ptr() == pointer, "in place: an alias sees it"
    assert target.tied is target.weight
    assert target.weight.grad_fn is None


def test_an_eta_of_one_copies_to_the_bit():
    source, target = Tiny(1), Tiny(2)
    with torch.no_grad():
        source.weight[0] = torch.tensor([-0.0, float("inf"), 1e-45])  # what arithmetic would not keep
    blend(source, target, 1.0)
    for name, tensor in values(source).items():
        got = values(target)[name]
        assert got.equal(tensor), name
        if tensor.is_floating_point():
            assert got.view(torch.int32).equal(tensor.view(torch.int32)), name


def test_what_is_equal_in_both_stays_so():
    source, target = Tiny(1), Tiny(1)
    for _ in range(50):
        blend(source, target, 0.3)
    assert all(values(target)[name].equal(tensor) for name, tensor in values(source).items())


def test_the_targets_type_counts():
    source, target = Tiny(1), Tiny(2, torch.bfloat16)
    blend(source, target, 1.0)
    assert target.weight.dtype == torch.bfloat16
    assert target.weight.equal(source.weight.to(torch.bfloat16))
    target = Tiny(2, torch.bfloat16)
    wanted = 0.3 * source.weight + 0.7 * target.weight
    blend(source, target, 0.3)
    assert target.running.dtype == torch.bfloat16
    torch.testing.assert_close(target.weight.float(), wanted, rtol=2e-2, atol=1e-2)


def test_models_that_differ_are_refused_and_left_alone():
    target = Tiny(2, width=5)
    before = values(target)
    with pytest.raises(
        ModelError, match=r"weight is \[4, 3\] in the source and \[4, 5\] in the target; take two models of one config"
    ):
        blend(Tiny(1), target, 0.3)
    more = Tiny(2)
    more.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ModelError, match=r"extra is missing in the source and \[1\] in the target"):
        blend(Tiny(1), more, 1.0)
    with pytest.raises(ModelError, match=r"extra is \[1\] in the source and missing in the target"):
        blend(more, Tiny(1), 1.0)
    assert all(values(target)[name].equal(tensor) for name, tensor in before.items())
