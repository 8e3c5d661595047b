"""Steps of AdamW against torch's own, learning rates against transformers' own, and what float32 masters are for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from trainmaster.api.config import Optimizer, ParameterGroup, RateSchedule
from trainmaster.workers.optimizer import ShardOptimizer, rate_factor
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

STEPS = 20


def made(named: dict[str, nn.Parameter], config: Optimizer, num_steps: int = STEPS) -> ShardOptimizer:
    return ShardOptimizer(list(named.items()), config, num_steps, {})


def rounded(values: torch.Tensor) -> tuple[nn.Parameter, dict[nn.Parameter, torch.Tensor]]:
    """A bfloat16 parameter of these float32 values, and its master."""
    parameter = nn.Parameter(values.bfloat16())
    parameter.grad_dtype = torch.float32
    return parameter, {parameter: values}


def test_everything_that_an_optimizer_keeps_is_moved():
    parameters = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(3))}
    optimizer = made(parameters, Optimizer())
    for each in parameters.values():
        each.grad = torch.ones_like(each)
    optimizer.step(1)
    kept = [value for state in optimizer.adamw.state.values() for value in state.values()]
    assert len(kept) == 6, "of each: a step count and two moments"
    optimizer.move(torch.device("meta"))
    moved = [value for state in optimizer.adamw.state.values() for value in state.values()]
    assert {value.device.type for value in moved} == {"meta"}
    assert {each.device.type for each in parameters.values()} == {"cpu"}, "parameters are moved with their module"


def test_an_optimizer_that_took_no_step_has_nothing_to_move():
    optimizer = made({"a": nn.Parameter(torch.ones(2))}, Optimizer())
    optimizer.move(torch.device("meta"))
    assert not optimizer.adamw.state


# -- learning rates ---------------------------------------------------------------------------------------------------


def theirs(schedule: str, warmup: int, floor: float) -> list[float]:
    """Factors of transformers' own schedule, by optimizer step, the first of which has number 0."""
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    match schedule, floor:
        case "constant", _:
            scheduler = get_constant_schedule_with_warmup(adamw, warmup)
        case "linear", _:
            scheduler = get_linear_schedule_with_warmup(adamw, warmup, STEPS)
        case "cosine", 0.0:
            scheduler = get_cosine_schedule_with_warmup(adamw, warmup, STEPS)
        case "cosine", _:
            scheduler = get_cosine_with_min_lr_schedule_with_warmup(adamw, warmup, STEPS, min_lr_rate=floor)
    factors = []
    for _ in range(STEPS):
        factors.append(adamw.param_groups[0]["lr"])
        adamw.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize(
    ("schedule", "floor"), [("constant", 0.0), ("linear", 0.0), ("linear", 0.2), ("cosine", 0.0), ("cosine", 0.1)]
)
def test_after_the_warmup_the_rate_is_that_of_transformers(schedule: str, floor: float, warmup: int):
    config = Optimizer(schedule=RateSchedule(schedule), warmup_steps=warmup, decay_floor=floor)
    wanted = theirs(schedule, warmup, floor)
    if schedule == "linear":  # theirs has no floor
        wanted = [floor + (1 - floor) * factor for factor in wanted]
    got = [rate_factor(config, step, STEPS) for step in range(1, STEPS + 1)]
    assert got[warmup:] == pytest.approx(wanted[warmup:], rel=1e-9)
    assert got[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert min(got) > 0, "no step is wasted"


@pytest.mark.parametrize("schedule", [RateSchedule.LINEAR, RateSchedule.COSINE])
def test_the_rate_falls_over_the_steps_that_are_given_and_stays_at_its_floor(schedule: RateSchedule):
    config = Optimizer(schedule=schedule, warmup_steps=2, decay_steps=10, decay_floor=0.25)
    factors = [rate_factor(config, step, 1000) for step in range(1, 30)]
    assert factors[1] == factors[2] == 1.0
    assert all(one > other for one, other in pairwise(factors[2:11]))
    assert factors[10:] == pytest.approx([0.25] * 19)
    assert factors[6] == pytest.approx(0.625), "half-way: both schedules are in the middle"


def test_a_run_that_is_shorter_than_its_warmup_only_warms_up():
    config = Optimizer(schedule=RateSchedule.COSINE, warmup_steps=10)
    assert [rate_factor(config, step, 3) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
    assert math.isfinite(rate_factor(config, 11, 3))


# -- groups -----------------------------------------------------------------------------------------------------------

NAMES = ("model.embed.weight", "model.layers.0.q.weight", "model.layers.0.norm.weight", "model.layers.1.q.bias")


def test_each_parameter_has_the_rate_and_the_decay_of_its_first_group():
    config = Optimizer(
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        groups=(
            ParameterGroup(parameters=r"embed", learning_rate=1e-3),
            ParameterGroup(parameters=r"layers\.0\.", weight_decay=0.3),
            ParameterGroup(parameters=r"\.weight$", learning_rate=7.0),
            ParameterGroup(parameters=r"nowhere", learning_rate=7.0),
        ),
    )
    named = {name: nn.Parameter(torch.ones(2, 2) if name.endswith("q.weight") else torch.ones(2)) for name in NAMES}
    named[NAMES[0]] = nn.Parameter(torch.ones(3, 2))
    optimizer = made(named, config)
    assert optimizer.groups_used == (0, 1), "the third comes too late, the fourth matches nothing"
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    assert optimizer.step(1) == pytest.approx(5e-3)
    found = {id(each): group for group in optimizer.adamw.param_groups for each in group["params"]}
    got = [(found[id(each)]["lr"], found[id(each)]["weight_decay"]) for each in named.values()]
    assert got == [(5e-4, 0.1), (5e-3, 0.3), (5e-3, 0.3), (5e-3, 0.0)]
    # gradients of zero: all that moves a weight is its decay
    for each, (rate, decay) in zip(named.values(), got, strict=True):
        torch.testing.assert_close(each.detach(), torch.full_like(each, 1 - rate * decay))


def test_without_groups_decay_goes_to_matrices_only():
    named = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    groups = made(named, Optimizer(weight_decay=0.1)).adamw.param_groups
    assert [(group["weight_decay"], len(group["params"][0].shape)) for group in groups] == [(0.1, 2), (0.0, 1)]


# -- masters ----------------------------------------------------------------------------------------------------------


def test_updates_below_the_last_bit_add_up():
    """bfloat16 has 8 bits: next to 1, a step of 1e-4 is a thirtieth of the smallest there is."""
    config, count = Optimizer(learning_rate=1e-4), 100
    parameter, masters = rounded(torch.ones(4, 4))
    optimizer = ShardOptimizer([("a", parameter)], config, count, masters)
    naive = nn.Parameter(torch.ones(4, 4).bfloat16())
    plain = torch.optim.AdamW([naive], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(1, count + 1):
        parameter.grad, naive.grad = torch.ones(4, 4), torch.ones(4, 4).bfloat16()
        optimizer.step(number)
        plain.step()
    assert torch.equal(naive.detach(), torch.ones(4, 4).bfloat16()), "without masters, all of it is lost"
    torch.testing.assert_close(optimizer.masters[parameter].detach(), torch.full((4, 4), 0.99), rtol=1e-4, atol=0)
    assert torch.equal(parameter.detach(), torch.full((4, 4), 0.99).bfloat16())


def test_masters_take_the_steps_of_a_float32_model():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)
    config = Optimizer(learning_rate=1e-2, weight_decay=0.1, schedule=RateSchedule.COSINE)
    parameter, masters = rounded(values.clone())
    optimizer = ShardOptimizer([("a", parameter)], config, STEPS, masters)
    exact = nn.Parameter(values.clone())
    plain = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(1, STEPS + 1):
        gradient = torch.randn(5, 3, generator=generator)
        parameter.grad, exact.grad = gradient, gradient.clone()
        plain.param_groups[0]["lr"] = 1e-2 * rate_factor(config, number, STEPS)
        optimizer.step(number)
        plain.step()
        assert torch.equal(parameter.detach(), optimizer.masters[parameter].detach().bfloat16())
    torch.testing.assert_close(optimizer.masters[parameter].detach(), exact.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_kernel_is_fused_where_there_is_one_and_steps_are_the_same(is_fused: bool, monkeypatch):
    if not is_fused:
        monkeypatch.setattr("trainmaster.workers.optimizer._FUSED", ())
    generator, config = torch.Generator().manual_seed(0), replace(Optimizer(), learning_rate=1e-2, weight_decay=0.1)
    ours, exact = (nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    optimizer = made({"a": ours}, config)
    assert (optimizer.adamw.defaults["fused"], optimizer.adamw.defaults["foreach"]) == (is_fused, not is_fused)
    plain = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for number in range(1, 4):
        ours.grad = torch.randn(4, 3, generator=generator)
        exact.grad = ours.grad.clone()
        optimizer.step(number)
        plain.step()
    torch.testing.assert_close(ours.detach(), exact.detach(), rtol=1e-5, atol=1e-6)
    optimizer.zero_grad()
    assert ours.grad is None
