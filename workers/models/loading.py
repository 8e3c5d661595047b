"""Making stages: from a Hugging Face directory, or from nothing but a configuration and a seed.

Owns: reading only one stage's tensors, and drawing weights that do not depend on the cut.

Invariants: a loaded stage shares no memory with its files; an initialised one has the same weights whatever the number
of stages, the device and what was drawn before; torch's generators are as before the call. Neither holds the whole
model at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...api.errors import ModelError
from ...api.hub import directory_of
from ...api.model_support import Packing, Way, support_table
from ...system.service.manifest import read_manifest
from ..seeding import seed_of
from . import attention, hf_compat, integrity, probe
from .checkpoint import names_in_checkpoint, shown, tensor_shapes
from .configs import config_from_directory, config_from_keywords
from .cut import Absent, Cut, prune, replace_head
from .stage import Head, Stage

Watch = Callable[[PreTrainedModel], None]
"""Shown a model on the meta device, before any of it is read or drawn; raises if it is not as wanted."""


def load_stage(
    path: Path,
    index: int,
    num_stages: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    head: Head = Head.LANGUAGE,
    seed: int = 0,
    way: Way | None = None,
    survey: Watch | None = None,
    admit: Watch | None = None,
) -> Stage:
    """Read stage `index` of `num_stages` of a checkpoint, in training mode.

    `path` is a directory, or the name of a repository in this machine's Hugging Face cache. Only safetensors, and only
    this stage's tensors, are read; files are checked first (see `integrity`). A scalar head that a checkpoint of a
    language model lacks is drawn from `seed`. `way`: None for what the support table says of the model's type.
    `survey` is shown the whole model, `admit` the stage's.

    Raises ModelError for a directory that is no checkpoint or is damaged, for tensors that are missing, misshapen or
    too many, by name, and for models that no stage can run; ConfigError for more stages than layers.

        load_stage(Path("Qwen/Qwen3-0.6B"), index=0, num_stages=2, device=cpu)
    """
    with hf_compat.quiet():
        directory = directory_of(path)
        config = config_from_directory(directory)
        integrity.check(directory)

        def admit_and_hash(pruned: PreTrainedModel) -> None:
            if admit is not None:
                admit(pruned)
            if read_manifest(directory):
                integrity.check_digests(directory, integrity.files_with(directory, names_in_checkpoint(pruned)))

        is_language_model = not any("ForSequenceClassification" in name for name in config.architectures or ())
        pruning = _Pruning(config, index, num_stages, head, way, survey, admit_and_hash)
        try:
            shapes = tensor_shapes(directory)

            def prune_and_check(model: PreTrainedModel) -> None:
                pruning(model)
                if faults := hf_compat.conversion_faults(model, shapes):
                    raise _unfit(directory, faults)

            with _blaming_the_cut(num_stages):
                model, faults = hf_compat.read_pruned(
                    directory, config, prune_and_check, pruning.attention, pruning.name, dtype
                )
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{directory} cannot be read as a safetensors checkpoint: {error}") from error
        if head is Head.SCALAR and is_language_model and _MISSING_SCORE in faults:
            faults.remove(_MISSING_SCORE)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                _draw(model.get_submodule("score"), "score", model, seed)
        if faults:
            raise _unfit(directory, faults)
        _own_memory(model)
        return _finish(model, pruning, device)


def init_stage(
    config: dict[str, Any],  # keywords of a foreign class
    seed: int,
    index: int,
    num_stages: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    head: Head = Head.LANGUAGE,
    way: Way | None = None,
    survey: Watch | None = None,
    admit: Watch | None = None,
) -> Stage:
    """Draw stage `index` of `num_stages` of the model that `config` describes, in training mode.

    `config` holds keywords of transformers' configuration and its "model_type". Weights are those that the model's
    author intends, from a generator that is seeded for every module by `seed` and the module's name. `way`: None for
    what the support table says of the model's type. `survey` is shown the whole model, `admit` the stage's. Raises
    ConfigError on `model.config.<key>`; ModelError for models that no stage can run or that leave a tensor unset.

        init_stage({"model_type": "qwen2", "hidden_size": 64, ...}, seed=1, index=0, num_stages=2, device=cpu)
    """
    with hf_compat.quiet():
        described = config_from_keywords(config)
        pruning = _Pruning(described, index, num_stages, head, way, survey, admit)
        model = hf_compat.build_pruned(described, pruning, pruning.attention, pruning.name, dtype)
        with _blaming_the_cut(num_stages):
            _initialise(model, seed)
        return _finish(model, pruning, device)


_MISSING_SCORE = "score.weight is missing"


def _unfit(directory: Path, faults: Sequence[str]) -> ModelError:
    return ModelError(
        f"{directory} does not fit its config.json: {shown(faults)}. Take the config.json that was saved with it, or "
        "fetch the files anew"
    )


class _Pruning:
    """Prunes the one model that it is called with, which is to be built from `config`, and keeps how."""

    def __init__(
        self,
        config: PretrainedConfig,
        index: int,
        num_stages: int,
        head: Head,
        way: Way | None,
        survey: Watch | None,
        admit: Watch | None,
    ) -> None:
        self.index, self.num_stages, self.head = index, num_stages, head
        self._survey, self._admit = survey, admit
        self.way = _measured_way(config, num_stages) if way is None else way
        self.attention = attention.ATTENTION if self.way.packing is Packing.ROW else None
        self.name = hf_compat.causal_lm_class(config).__name__
        self.cut: Cut | None = None
        self.untrained: list[str] = []
        """Parameters that the model's author never trains; from_pretrained forgets it."""
        attention.register()
        if head is Head.SCALAR:
            config.num_labels = 1
            self.name = hf_compat.scalar_name(config)

    def __call__(self, model: PreTrainedModel) -> None:
        if self.head is Head.SCALAR:
            replace_head(model)
        if self._survey is not None:
            self._survey(model)
        self.cut = prune(model, self.index, self.num_stages, self.way.embeds_everywhere)
        self.untrained = [name for name, each in model.named_parameters() if not each.requires_grad]
        if self._admit is not None:
            self._admit(model)


def _measured_way(config: PretrainedConfig, num_stages: int) -> Way:
    """How the support table says that a model runs. Raises ModelError if it says that it does not."""
    support = support_table().of(config.model_type)
    if refusal := support.refusal(config.to_dict(), num_stages):
        raise ModelError("; ".join(refusal))
    assert support.way is not None, "a type that does not run is refused"
    return support.way


@contextmanager
def _blaming_the_cut(num_stages: int) -> Iterator[None]:
    """Some models initialise, even after loading, a module from outside of it (modernbert-decoder its head)."""
    try:
        yield
    except AttributeError as error:
        if num_stages == 1:
            raise
        raise ModelError(
            f"this model type needs all of its modules at once ({error}); set layout.pp and chunks to 1"
        ) from error


def _finish(model: PreTrainedModel, pruning: _Pruning, device: torch.device) -> Stage:
    assert pruning.cut is not None, "a model is pruned as soon as it is built"
    cut = pruning.cut
    if cut.has_tied_embedding and pruning.index == pruning.num_stages - 1:
        _check_tie(model)
    stage = Stage(model, cut, pruning.index, pruning.num_stages, pruning.way.packing, pruning.head).to(device)
    stage.train()
    for name in pruning.untrained:
        model.get_parameter(name).requires_grad_(False)
    probe.check(stage)
    return stage


def _check_tie(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        raise ModelError(
            f"{model.config.name_or_path or type(model).__name__} says tie_word_embeddings, yet its head is not its "
            "embedding; set tie_word_embeddings to false in its config.json"
        )


def _own_memory(model: PreTrainedModel) -> None:
    """Copy what the loader left as views of memory-mapped files: writing the files would change the model."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Give a pruned model on the meta device memory and weights, on the CPU so that no device changes them."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in _tensors(model).values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    untouched = {name: (tensor, tensor._version) for name, tensor in _tensors(model).items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _draw(model, "", model, seed)
    hf_compat.tie(model)
    unset = []
    for name, tensor in _tensors(model).items():
        before, version = untouched.get(name, (None, 0))
        if tensor.isnan().any() if tensor.is_floating_point() else (tensor is before and tensor._version == version):
            unset.append(name)
    if unset:
        kind = f"model type {model.config.model_type!r}"
        raise ModelError(f"{kind} leaves {', '.join(sorted(unset))} without initial values; load a checkpoint instead")


def _draw(module: nn.Module, name: str, author: PreTrainedModel, seed: int) -> None:
    """Initialise a module after its children, each from a generator seeded by its name, as the nearest author wrote."""
    for child_name, child in module.named_children():
        if not isinstance(child, Absent):
            child_author = child if isinstance(child, PreTrainedModel) else author
            _draw(child, f"{name}.{child_name}" if name else child_name, child_author, seed)
    torch.default_generator.manual_seed(seed_of(seed, name))
    hf_compat.initialise_module(author, module)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and buffers, also those that are not saved, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
