"""What a call made of its inputs, on one shard, as a file: what `doctor` compares with one process.

    RUN/records/CALL-worker-R.safetensors
        input/0/tokens, lengths, key/...      of microbatch 0, as the last stage got it
        output/0/logits, log_probabilities    what the last stage made of it
        gradient/model.norm.weight            of the minibatch, all replicas, before clipping; on the stage that owns it
        metadata                              the call, replica, ids of sequences, loss and gradient norm

Only a call's first minibatch is recorded, on the weights with which the run began and without dropout. Advantages are
made up: those of real rewards may all be 0, and so would be all gradients.

Shapes: T tokens of a microbatch, S sequences, V vocabulary size, k tokens whose logits are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .algorithms.functional import predicted_positions, token_log_probabilities
from .data.microbatch import Microbatch
from .models.attention import PackedBatch
from .models.stage import Stage

NUM_LOGITS = 32
"""k, at most: the first tokens of each microbatch. All would be too many to keep."""
DIRECTORY = "records"
ADVANTAGES = (1.0, -0.5)
"""Of a microbatch's sequences, in turn: of both signs, and unequal, so that equal responses do not cancel out."""


@dataclass(frozen=True)
class Output:
    """What the last stage made of a microbatch."""

    logits: Tensor
    """`[k, V]`, float32."""
    log_probabilities: Tensor
    """`[T - S]`, float32, at temperature 1: of each token but the first of its sequence."""


@dataclass
class Record:
    """Filled while a call runs."""

    graph: str
    call: str
    replica: int
    microbatches: list[Microbatch] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    """`loss` and `gradient_norm`, of the whole minibatch."""

    @torch.no_grad()
    def saw(self, stage: Stage, hidden: Tensor, microbatch: Microbatch) -> None:
        """The last stage is about to take its loss or scores. hidden [1, T, H]."""
        everywhere = torch.ones(microbatch.num_tokens, dtype=torch.bool, device=hidden.device)
        positions = predicted_positions(everywhere, microbatch.packed)
        self.microbatches.append(microbatch)
        self.outputs.append(
            Output(
                logits=stage.logits(hidden[:, :NUM_LOGITS])[0].float().cpu(),
                log_probabilities=token_log_probabilities(stage, hidden, microbatch.tokens, positions).cpu(),
            )
        )

    def stepped(self, stages: Sequence[Stage]) -> None:
        """The gradients of the minibatch are complete."""
        self.gradients = {
            name: parameter.grad.float().cpu().clone()
            for stage in stages
            for name, parameter in stage.own_parameters()
            if parameter.grad is not None
        }

    def write(self, path: Path) -> None:
        tensors = {f"gradient/{name}": gradient for name, gradient in self.gradients.items()}
        for at, (microbatch, output) in enumerate(zip(self.microbatches, self.outputs, strict=True)):
            tensors[f"input/{at}/tokens"] = microbatch.tokens
            tensors[f"input/{at}/lengths"] = torch.tensor(microbatch.packed.seqlens)
            tensors |= {f"input/{at}/key/{key}": value for key, value in microbatch.keys.items()}
            tensors[f"output/{at}/logits"] = output.logits
            tensors[f"output/{at}/log_probabilities"] = output.log_probabilities
        told = {
            "graph": self.graph,
            "call": self.call,
            "replica": self.replica,
            "ids": [microbatch.ids for microbatch in self.microbatches],
            "figures": self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, {"record": json.dumps(told)})


def with_made_up_advantages(microbatch: Microbatch) -> Microbatch:
    """The microbatch as it is recorded; as it is, if nobody trains on advantages here."""
    if (given := microbatch.keys.get("advantage")) is None:
        return microbatch
    places = torch.arange(len(given), device=given.device) % len(ADVANTAGES)
    made_up = given.new_tensor(ADVANTAGES)[places]
    return replace(microbatch, keys={**microbatch.keys, "advantage": made_up})


def path_of(run_directory: Path, call: str, worker: int) -> Path:
    return run_directory / DIRECTORY / f"{call}-worker-{worker}.safetensors"


def read_all(run_directory: Path, call: str) -> list[Record]:
    """Those of a call, of all its workers."""
    return [read(path) for path in sorted((run_directory / DIRECTORY).glob(f"{call}-worker-*.safetensors"))]


def read(path: Path) -> Record:
    """What `write` wrote, on the CPU."""
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    record = Record(told["graph"], told["call"], told["replica"], figures=told["figures"])
    record.gradients = _under("gradient/", tensors)
    for at, ids in enumerate(told["ids"]):
        given, made = _under(f"input/{at}/", tensors), _under(f"output/{at}/", tensors)
        packed = PackedBatch(tuple(given["lengths"].tolist()), torch.device("cpu"))
        record.microbatches.append(Microbatch(given["tokens"], packed, _under("key/", given), tuple(ids)))
        record.outputs.append(Output(**made))
    return record


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
