"""The configuration records that experiments are made of: what a user writes, checked when it is written.

A record checks what it can know by itself (types, ranges, its own fields against each other). Experiments check their
records against each other; `system.preflight` checks them against the disk. Nothing here reads a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from .errors import ConfigError
from .record import record


class Schedule(StrEnum):
    """In which order a pipeline trains microbatches: see docs/pipelines.md."""

    ONE_F_ONE_B = "1f1b"
    """One forward and one backward by turns: holds few activations."""
    GPIPE = "gpipe"
    """All forwards, then all backwards."""
    INTERLEAVED = "interleaved"
    """1f1b with several stages a worker (`chunks`): a smaller bubble, more messages."""
    ZB_H1 = "zb-h1"
    """1f1b whose gradients of weights fill the bubble."""


class Recompute(StrEnum):
    """Which activations a training step computes again instead of keeping them: see docs/training.md."""

    NONE = "none"
    """Everything is kept."""
    SELECTIVE = "selective"
    """Of each layer, products of matrices and attention are kept; the cheap rest is computed again in the backward."""
    FULL = "full"
    """Of each layer only its input is kept; the backward computes one layer at a time again."""
    STAGE = "stage"
    """Of each pipeline stage only its input is kept until its backward is due. Of a pipeline (`pp` above 1) only."""


@record
class Layout:
    """How one replica set of a model is cut over workers: `dp * pp * tp * sp` workers, one shard each.

    Ranks count up fastest along tp, then sp, then pp, then dp.
    """

    dp: PositiveInt = 1
    """Data parallel: the number of whole copies of the model; each takes a share of every minibatch."""
    pp: PositiveInt = 1
    """Pipeline parallel: the number of stages that the layers are cut into, at most the number of layers."""
    tp: PositiveInt = 1
    """Tensor parallel: the number of workers that share each layer. This version runs 1 only."""
    sp: PositiveInt = 1
    """Sequence parallel: the number of workers that share each sequence. This version runs 1 only."""
    schedule: Schedule = Schedule.ONE_F_ONE_B
    """In which order stages train microbatches: `1f1b`, `gpipe`, `interleaved` or `zb-h1`. The result is the same."""
    chunks: PositiveInt = 1
    """Stages that each worker holds, for `interleaved`: the layers are cut into `pp * chunks` stages, at most the
    number of layers."""
    recompute: Recompute = Recompute.NONE
    """Which activations are computed again instead of kept, for less memory and more time: `none`, `selective`, `full`
    or `stage`. The result is the same. `True` is `stage`, `False` is `none`."""

    @field_validator("recompute", mode="before")
    @classmethod
    def _take_truth_values(cls, value: object) -> object:
        if isinstance(value, bool):
            return Recompute.STAGE if value else Recompute.NONE
        return value

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("sp", self.sp)):
            if size != 1:
                raise ConfigError(
                    f"Layout.{axis}", size, "this version runs 1 only", "set it to 1 and spread the model by pp and dp"
                )
        if self.chunks > 1 and self.schedule is not Schedule.INTERLEAVED:
            rule = f"schedule {self.schedule} has one stage a worker"
            raise ConfigError("Layout.chunks", self.chunks, rule, "set it to 1, or schedule to interleaved")
        if self.chunks > 1 and self.pp == 1:
            raise ConfigError("Layout.chunks", self.chunks, "chunks are of a pipeline, and pp is 1", "raise pp")
        if self.schedule is Schedule.INTERLEAVED and self.chunks == 1:
            rule = "interleaved has 2 stages a worker or more"
            raise ConfigError("Layout.chunks", self.chunks, rule, "raise it, or set schedule to 1f1b")
        if self.recompute is Recompute.STAGE and self.pp == 1:
            rule = "with pp = 1 each backward follows its forward at once, and nothing is held in between"
            raise ConfigError(
                "Layout.recompute", self.recompute.value, rule, "set it to full or selective, or raise pp"
            )

    @property
    def num_workers(self) -> int:
        return self.dp * self.pp * self.tp * self.sp

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are cut into."""
        return self.pp * self.chunks

    def is_cut_like(self, other: Layout) -> bool:
        """Whether both have the same piece of a model on each of their workers."""
        axes = ("dp", "pp", "tp", "sp", "chunks")
        return all(getattr(self, axis) == getattr(other, axis) for axis in axes)


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(field, pattern, f"is no regular expression ({error})", "correct it") from None


class Precision(StrEnum):
    """The type of a model's weights and activations."""

    FLOAT32 = "float32"
    """4 bytes."""
    BFLOAT16 = "bfloat16"
    """2 bytes, with the range of float32 and 8 bits of precision. Training keeps float32 weights beside."""


ALL_LINEAR = "all-linear"
"""In place of names of modules: every linear one, without the head."""


@record
class LoRA:
    """Low-rank adapters (arXiv 2106.09685) beside linear modules, `W x + lora_alpha / r * B A x`: A and B are trained.

    Names are those of peft's `LoraConfig`, and a checkpoint is a directory of peft's: see docs/training.md.
    """

    r: PositiveInt = 8
    """The rank: A is `[r, in]`, B is `[out, r]`."""
    lora_alpha: PositiveInt = 8
    """What an adapter adds is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training, the part of an adapter's inputs that is zeroed, at random."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Which modules get an adapter. Several names: each is a module's whole name, or the end of it after a dot
    (`("q_proj", "v_proj")`). One text: a regular expression for the whole name. `all-linear`: every linear module but
    the head. What finds no module in the model is an error."""
    use_rslora: bool = False
    """Multiply by `lora_alpha / sqrt(r)` instead (arXiv 2312.03732)."""
    path: Path | None = None
    """A directory of peft's, such as a checkpoint of an earlier run, to go on from, in any layout; the other fields
    must be as they were there, but for `lora_dropout`. By default A is random, and B is zero."""

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            _check_pattern("LoRA.target_modules", self.target_modules)
        elif not all(self.target_modules) or not self.target_modules:
            rule = "no module has an empty name" if self.target_modules else "there is nothing to train"
            raise ConfigError(
                "LoRA.target_modules", self.target_modules, rule, f"name modules, or leave it {ALL_LINEAR}"
            )

    @property
    def scale(self) -> float:
        """Of what an adapter adds."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@record
class Model:
    """A decoder-only causal language model of Hugging Face's, and how it is laid out.

    Exactly one of `path` and `config` is given.
    """

    path: Path | None = None
    """A Hugging Face directory: config.json, safetensors, and the tokenizer unless `tokenizer` names another."""
    config: dict[str, Any] = field(default_factory=dict)  # Any: the values are transformers' own, one set a model type
    """Fields of a transformers config, `model_type` among them: the model starts from random weights."""
    tokenizer: Path | None = None
    """A directory with the tokenizer; by default `path`."""
    dtype: Precision = Precision.FLOAT32
    """The type of weights and activations, also in checkpoints: `float32` or `bfloat16`. Log-probabilities, losses,
    gradients of weights and optimizer steps are float32 in both."""
    layout: Layout = field(default_factory=Layout)
    """How the model is cut over workers."""
    trainable: tuple[str, ...] = ()
    """Regular expressions that are found in names of parameters, such as `layers\\.3[01]\\.` or `norm`: these
    parameters are trained, and all others stay as they are. By default all are trained. One that is found in no name is
    an error."""
    lora: LoRA | None = None
    """Train adapters, and nothing of the model itself."""

    def __post_init__(self) -> None:
        for index, pattern in enumerate(self.trainable):
            _check_pattern(f"Model.trainable[{index}]", pattern)
        if self.trainable and self.lora is not None:
            rule = "with `lora`, adapters alone are trained"
            raise ConfigError("Model.trainable", self.trainable, rule, "leave one of the two out")
        if (self.path is None) == (not self.config):
            raise ConfigError(
                "Model.path",
                None if self.path is None else str(self.path),
                "exactly one of `path` (a Hugging Face directory) and `config` (random weights) must be given",
                "give one and remove the other",
            )
        if self.config and "model_type" not in self.config:
            raise ConfigError(
                "Model.config", sorted(self.config), "must name a `model_type`", 'add for example "model_type": "qwen2"'
            )
        if self.config and self.tokenizer is None:
            raise ConfigError(
                "Model.tokenizer", None, "a model from a config brings no tokenizer", "name its directory"
            )

    @property
    def tokenizer_path(self) -> Path:
        path = self.tokenizer or self.path
        assert path is not None, "checked at construction"
        return path


class NaNPolicy(StrEnum):
    """What becomes of an optimizer step whose loss or gradient is not finite."""

    STOP = "stop"
    """The run fails, and names the microbatch; the weights are as they were."""
    SKIP = "skip"
    """The step is not taken, on any worker, and counted (`skipped_steps`)."""


class RateSchedule(StrEnum):
    """How the learning rate goes on after its warmup."""

    CONSTANT = "constant"
    """It stays."""
    LINEAR = "linear"
    """It falls on a straight line."""
    COSINE = "cosine"
    """It falls along half a cosine: slowly, fast, slowly."""


@record
class ParameterGroup:
    """Parameters that an optimizer treats in their own way."""

    parameters: str
    """A regular expression that is found in their names, such as `embed` or `layers\\.(0|1)\\.`."""
    learning_rate: PositiveFloat | None = None
    """Their rate, with the same warmup and schedule; None: the optimizer's."""
    weight_decay: NonNegativeFloat | None = None
    """Their weight decay, of matrices and all else alike; None: as of all others."""

    def __post_init__(self) -> None:
        _check_pattern("ParameterGroup.parameters", self.parameters)
        if self.learning_rate is None and self.weight_decay is None:
            rule = "the group changes nothing"
            raise ConfigError(
                "ParameterGroup.parameters", self.parameters, rule, "give it a learning_rate or a weight_decay"
            )


@record
class Optimizer:
    """AdamW (arXiv 1711.05101) with linear warmup, a schedule, and clipping by the global gradient norm.

    Its steps are float32, on float32 copies of the weights where the model's are of another type.
    """

    learning_rate: PositiveFloat = 1e-5
    """The rate after the warmup."""
    schedule: RateSchedule = RateSchedule.CONSTANT
    """How the rate goes on after the warmup: `constant`, `linear` or `cosine`."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate rises linearly: step i of n uses `learning_rate * i / n`, i from 1."""
    decay_steps: PositiveInt | None = None
    """Optimizer steps, warmup included, after which `linear` and `cosine` have fallen; by default all of the run's."""
    decay_floor: NonNegativeFloat = 0.0
    """The part of the rate, from 0 to 1, at which `linear` and `cosine` end."""
    beta1: NonNegativeFloat = 0.9
    """Decay of the running mean of gradients; below 1."""
    beta2: NonNegativeFloat = 0.95
    """Decay of the running mean of squared gradients; below 1."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only (no norms, no biases)."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a rate or a weight decay of their own. Each parameter goes to the first group that it matches. A
    group that gets none of the model's is an error."""
    max_gradient_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this L2 norm, taken over all stages; None leaves them alone."""
    on_nan_loss: NaNPolicy = NaNPolicy.STOP
    """What to do if a loss or the gradient norm is NaN or infinite: `stop` the run, or `skip` the optimizer step."""
    state: Path | None = None
    """A checkpoint that a run with `save_optimizer` wrote, in any layout: moments and the count of steps begin as they
    were there, and so do warmup, schedule and random numbers. Give the model the same checkpoint. By default all begin
    at zero."""

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta >= 1:
                raise ConfigError(f"Optimizer.{name}", beta, "must be below 1", "use a value such as 0.9 or 0.95")
        if self.schedule is RateSchedule.CONSTANT:
            for name, value in (("decay_steps", self.decay_steps), ("decay_floor", self.decay_floor)):
                if value:
                    cure = "leave it out, or set schedule to linear or cosine"
                    raise ConfigError(f"Optimizer.{name}", value, "the rate of schedule constant does not fall", cure)
        if self.decay_floor > 1:
            raise ConfigError("Optimizer.decay_floor", self.decay_floor, "is a part of the rate", "use 0 to 1")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            rule = f"includes the {self.warmup_steps} warmup_steps, so nothing is left to fall in"
            raise ConfigError("Optimizer.decay_steps", self.decay_steps, rule, "raise it, or lower warmup_steps")


@record
class Dataset:
    """Training data: a JSON Lines file, one object a line.

    A row is either a prompt and an answer (fields `prompt` and `answer`), or a chat (field `messages`, a list of
    `{"role": ..., "content": ...}`, rendered by the tokenizer's chat template). Loss is taken on the answer and its
    end-of-sequence token, or on the assistant's turns.
    """

    path: Path
    """The JSON Lines file."""
    prompt: str = "prompt"
    """The name of the prompt's field."""
    answer: str = "answer"
    """The name of the answer's field."""
    messages: str | None = None
    """The name of the chat's field; given, rows are chats and `prompt` and `answer` are not read."""
    separator: str = ""
    """Text between prompt and answer, part of the prompt: no loss is taken on it."""
    shuffle: bool = True
    """Draw a new order for each pass, from the run's seed; False keeps the file's order."""


@record
class Deadlines:
    """How long master and workers wait, by what they wait for, in seconds. A wait that takes longer is named."""

    register_s: PositiveFloat = 300.0
    """For all workers to register, from the master's start."""
    setup_s: PositiveFloat = 600.0
    """For a worker to form its groups, to load its model, or to open a dataset."""
    call_s: PositiveFloat = 3600.0
    """For one call on one worker, its hooks included."""
    silence_s: PositiveFloat = 5.0
    """For a sign of life from a worker's or the master's host. Hosts answer while Python computes, or hangs."""
    orphan_s: NonNegativeFloat = 1.0
    """For a worker whose connection to its master closed to wait for one to come back, before it ends."""


@record
class RunOptions:
    """What holds for a run as a whole."""

    name: str = "run"
    """The run's name: its directory is `directory/name`, and must not exist yet."""
    directory: Path = Path("runs")
    """Where run directories are made."""
    seed: NonNegativeInt = 0
    """Seeds the initial weights, the order of the data and every other draw."""
    steps: PositiveInt | None = None
    """The number of steps (graph traversals). At most one of `steps` and `passes` is given; neither means one pass."""
    passes: PositiveFloat | None = None
    """The number of passes over the data; a last batch that would be incomplete is left out."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints. The last step is always saved."""
    save_optimizer: bool = False
    """Checkpoints hold the state of optimizers, too (see `Optimizer.state`): with float32 weights, three times as
    much."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations, if there is something to evaluate: then the start and the last step always are."""
    target_reward: float | None = None
    """End the run early, once `evaluation/reward` is at or above this: one more step is taken, and saved. Needs an
    evaluation of answers, and `evaluate_every`."""
    max_steps_ahead: NonNegativeInt = 0
    """How many steps may begin before the one before them has ended: generation then runs while earlier responses are
    scored and trained on. So responses come from weights that are at most this many steps old (`data/lag`). 0 is
    synchronous. A step more costs the memory of one batch."""
    workers: PositiveInt | None = None
    """The number of workers; by default what the layouts ask for, and it must agree with them."""
    threads: PositiveInt | None = None
    """Intra-op threads of each worker; by default its host's cores divided by the workers there, at least one."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    """How long to wait for what."""
    timeline_steps: tuple[PositiveInt, ...] = ()
    """Steps whose training is timed, by instruction: `trainmaster schedule --run NAME --step N` draws it."""
    log_json: bool = False
    """Write logs as JSON, one object a line."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.passes is not None:
            raise ConfigError(
                "RunOptions.passes",
                self.passes,
                f"`steps` is given too ({self.steps})",
                "give one and set the other to None",
            )
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ConfigError("RunOptions.name", self.name, "must be a plain folder name", "take the slashes out")

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory / self.name
