"""AdamW with warmup and global clipping, over the parameters of one shard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..api.config import Optimizer


def make_optimizer(parameters: Sequence[nn.Parameter], config: Optimizer) -> torch.optim.AdamW:
    """Weight decay goes to matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """All that it keeps of its parameters."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(device)


def learning_rate(config: Optimizer, step: int) -> float:
    """Of the optimizer's `step`-th step, from 1."""
    if step >= config.warmup_steps:
        return config.learning_rate
    return config.learning_rate * step / config.warmup_steps


def clip(parameters: Sequence[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scales gradients down so that their global L2 norm, `norm`, is at most `max_norm`."""
    if max_norm is None or norm <= max_norm:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
