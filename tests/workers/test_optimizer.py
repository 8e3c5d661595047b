import torch
from torch import nn
from trainmaster.api.config import Optimizer
from trainmaster.workers.optimizer import make_optimizer, move_state


def test_everything_that_an_optimizer_keeps_is_moved():
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    optimizer = make_optimizer(parameters, Optimizer())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    assert len(kept) == 6, "of each: a step count and two moments"
    move_state(optimizer, torch.device("meta"))
    moved = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    assert {value.device.type for value in moved} == {"meta"}


def test_an_optimizer_that_took_no_step_has_nothing_to_move():
    optimizer = make_optimizer([nn.Parameter(torch.ones(2))], Optimizer())
    move_state(optimizer, torch.device("meta"))
    assert not optimizer.state
