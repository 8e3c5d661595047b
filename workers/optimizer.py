"""AdamW over the parameters of one shard: float32 masters, parameter groups, and the learning rate of each step.

    parameter (bfloat16) --gradient (float32)--> master (float32), AdamW --rounded--> parameter

The master of a float32 parameter is the parameter itself. Another's is a float32 copy, without which an update smaller
than the parameter's last bit would be lost, step after step.

Bytes for each trained parameter: float32 16 (weight 4, gradient 4, moments 8); bfloat16 18 (2, 4, 8, and 4 the master).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from ..api.config import Optimizer, RateSchedule

_FUSED = ("cpu", "cuda")
"""Types of device for which torch has AdamW in one kernel."""
_RATE = "initial_lr"
"""The key, in a parameter group, of its rate before warmup and schedule."""


class ShardOptimizer:
    """Owns the masters, and what AdamW keeps of them in `adamw`, by master.

    `groups_used`: indices of the configured groups that have a parameter here; `num_steps`: over which its learning
    rate may fall, those before this run included.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        config: Optimizer,
        num_steps: int,
        masters: Mapping[nn.Parameter, Tensor],
    ) -> None:
        """`named`: what is trained, by its name in the model; `num_steps`: optimizer steps of the whole run; `masters`:
        float32 values of those parameters that are of another type."""
        self._config, self.num_steps = config, num_steps
        self.masters: dict[nn.Parameter, nn.Parameter] = {
            parameter: nn.Parameter(masters[parameter].to(parameter.device)) if parameter in masters else parameter
            for _, parameter in named
        }
        """By parameter."""
        patterns = [re.compile(group.parameters) for group in config.groups]
        members: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
        for name, parameter in named:
            index = next((at for at, pattern in enumerate(patterns) if pattern.search(name)), None)
            members.setdefault((index, parameter.ndim >= 2), []).append(self.masters[parameter])
        members = members or {(None, True): []}  # a stage may have nothing to train, and AdamW wants a group
        self.groups_used = tuple(sorted({index for index, _ in members if index is not None}))
        is_fused = all(parameter.device.type in _FUSED for parameter in self.masters.values())
        self.adamw = torch.optim.AdamW(
            [_settings(config, index, is_matrix) | {"params": each} for (index, is_matrix), each in members.items()],
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=is_fused,
            foreach=not is_fused,
        )

    def zero_grad(self) -> None:
        for parameter in self.masters:
            parameter.grad = None

    def step(self, number: int) -> float:
        """The run's `number`-th optimizer step, from 1, by the parameters' gradients. Returns the learning rate."""
        factor = rate_factor(self._config, number, self.num_steps)
        for group in self.adamw.param_groups:
            group["lr"] = group[_RATE] * factor
        copies = [(parameter, master) for parameter, master in self.masters.items() if parameter is not master]
        for parameter, master in copies:
            master.grad = parameter.grad
        self.adamw.step()
        for _, master in copies:
            master.grad = None
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([parameter for parameter, _ in copies], [master for _, master in copies])
        return self._config.learning_rate * factor

    def move(self, device: torch.device) -> None:
        """All that it keeps besides the parameters."""
        for parameter, master in self.masters.items():
            if parameter is not master:
                master.data = master.data.to(device)
        for state in self.adamw.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(device)


def _settings(config: Optimizer, index: int | None, is_matrix: bool) -> dict[str, float]:
    """Weight decay goes to matrices, if no group says otherwise."""
    rate, decay = config.learning_rate, config.weight_decay if is_matrix else 0.0
    if index is not None:
        group = config.groups[index]
        rate = rate if group.learning_rate is None else group.learning_rate
        decay = decay if group.weight_decay is None else group.weight_decay
    return {"lr": rate, _RATE: rate, "weight_decay": decay}


def rate_factor(config: Optimizer, step: int, num_steps: int) -> float:
    """What the learning rate of the `step`-th optimizer step, from 1, is multiplied by.

    In the warmup of w steps it is `step / w`. After it, and until the last step of the decay, it is what transformers'
    schedules give at that step (`get_cosine_with_min_lr_schedule_with_warmup` and its like, which count from 0): the
    first step has the full rate, and none has a rate of zero. Then it is the floor.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule is RateSchedule.CONSTANT:
        return 1.0
    end = num_steps if config.decay_steps is None else config.decay_steps
    progress = min(1.0, (step - 1 - config.warmup_steps) / max(1, end - config.warmup_steps))
    match config.schedule:
        case RateSchedule.LINEAR:
            left = 1.0 - progress
        case RateSchedule.COSINE:
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            assert_never(config.schedule)
    return config.decay_floor + (1.0 - config.decay_floor) * left


def clip(parameters: Sequence[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scales gradients down so that their global L2 norm, `norm`, is at most `max_norm`."""
    if max_norm is None or norm <= max_norm:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:  # a stage may have none
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
