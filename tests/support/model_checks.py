"""What a support table says of a model type, measured: our stages against transformers' own whole model.

    split       each document by itself, through 2 stages and through 3
    packed      documents in one row: each as it is alone; none moves when another changes, nor when a later token does
    gradients   of every parameter, over two microbatches, where only hidden states and their gradients cross stages
    decode      with KV caches: prompts, rows that go on, end, move and join, at every step
    save        what all stages write: the names and the bits of save_pretrained's, and whole when read again

The other side is a model of transformers' own, uncut and with its own attention, that is given one document at a time.
Switches of a type's configuration, the tie of its embeddings among them, are tried one by one, with all but `split`.
A check raises `Differs`. It takes its stages from a function, so that tests can hand it broken ones.

Shapes: T tokens of a row, V vocabulary size.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import causal_class, flip, flipped, missing_kinds, tiny_configs
from torch import Tensor, nn
from trainmaster.api.errors import TrainmasterError
from trainmaster.api.model_support import Column, Packing, Support, Way
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch, PackedPass
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.models.loading import load_stage
from trainmaster.workers.models.stage import Stage
from transformers import AutoConfig, PreTrainedModel

CPU = torch.device("cpu")
MICROBATCHES = ((5, 17, 1, 23), (12, 9))
"""Lengths of documents; windows are of 8."""
TOLERANCE = 1e-5
"""Of outputs, by the largest of them."""
GRADIENT_TOLERANCE = 5e-5
"""Of a parameter's gradient, by its largest, or by 1e-3 of the largest of all: some are zero but for rounding."""
LEAK = 1e-6
"""How far an output may move when another document changes: grouped products of experts round differently."""
NO_CACHE = "has no cached decode where it runs one sequence a call"
MakeStages = Callable[[int], list[Stage]]
"""Stages, as many as asked for. Checks leave nothing in them but gradients."""

Check = Callable[[MakeStages, "Reference"], None]


class Differs(Exception):
    """A check failed. `reason` is for the table; the message also tells by how much, which no two machines agree on."""

    def __init__(self, reason: str, by: float | None = None) -> None:
        self.reason = reason
        super().__init__(reason if by is None else f"{reason}, by {by:.1e}")


@dataclass
class Microbatch:
    """Documents, and what the whole model gives for each alone."""

    documents: list[Tensor]
    """[1, length] each."""
    logits: Tensor
    """[1, T, V], of one after the other."""
    weights: Tensor
    """[1, T, V]: the loss is sum(logits * weights)."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(document.shape[1] for document in self.documents)

    @property
    def row(self) -> Tensor:
        """[1, T]"""
        return torch.cat(self.documents, 1)


@dataclass
class Reference:
    """A whole model by transformers, and what it gives."""

    config: Mapping[str, Any]  # values are those of a foreign class
    """Keywords, `model_type` among them."""
    model: PreTrainedModel
    directory: Path
    """What its save_pretrained wrote."""
    microbatches: list[Microbatch] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the loss over all microbatches."""


def make_reference(config: Mapping[str, Any], directory: Path) -> Reference:  # values are those of a foreign class
    """From weights that are random, away from ones and zeros."""
    with torch.random.fork_rng(devices=[]), hf_compat.quiet():
        torch.manual_seed(0)
        described = AutoConfig.for_model(**copy.deepcopy(dict(config)))
        model = _by_the_definition(causal_class(type(described)), described)
        with torch.no_grad():
            saved = model.state_dict()
            # and buffers that are saved, if they are no masks
            buffers = [each for name, each in model.named_buffers() if name in saved and each.dim() < 2]
            for tensor in (*model.parameters(), *(each for each in buffers if each.is_floating_point())):
                tensor.add_(torch.randn_like(tensor) * 0.05)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # as transformers has it after loading
        model.eval().save_pretrained(directory)
        reference = Reference(config, model, directory)
        for lengths in MICROBATCHES:
            documents = [torch.randint(3, 60, (1, length)) for length in lengths]
            logits = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in documents], 1)
            weights = torch.randn_like(logits)
            (logits * weights).sum().backward()
            reference.microbatches.append(Microbatch(documents, logits.detach(), weights))
    reference.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return reference


def _by_the_definition(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:  # foreign types
    """Eager attention where the type has it: softcaps and sinks are in no other."""
    try:
        return model_class._from_config(config, attn_implementation="eager")
    except (ImportError, ValueError):
        return model_class._from_config(config)


def check_split(make: MakeStages, reference: Reference) -> None:
    """Each document by itself through 2 stages, and through 3."""
    for num_stages in (2, 3):
        stages = make(num_stages)
        with torch.no_grad():
            for microbatch in reference.microbatches:
                alone = [logits_of(stages, document, (document.shape[1],)) for document in microbatch.documents]
                _assert_close(torch.cat(alone, 1), microbatch.logits, f"outputs of {num_stages} stages")


def check_packed(make: MakeStages, reference: Reference, num_stages: int) -> None:
    """Documents in one row."""
    if any(getattr(module, "is_causal", True) is False for module in reference.model.modules()):
        raise Differs("is not causal: its tokens see later ones")  # eager attention knows of nothing but its mask
    stages = make(num_stages)
    with torch.no_grad():
        for microbatch in reference.microbatches:
            row, lengths = microbatch.row, microbatch.lengths
            packed = logits_of(stages, row, lengths)
            _assert_close(packed, microbatch.logits, "outputs of packed documents")
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                for first in {start, (start + end) // 2}:  # a whole document, and its second half
                    other = row.clone()
                    other[:, first:end] = 3 + (other[:, first:end] + 4) % 57  # every token is another one
                    moved = (logits_of(stages, other, lengths) - packed).abs().amax(-1)[0] / packed.abs().max()
                    if moved[first:end].max() <= LEAK:
                        raise Differs("gives outputs that do not depend on the tokens of their own document")
                    if not bool((moved[start:first] <= LEAK).all()):  # NaN fails, too
                        raise Differs("gives outputs that depend on later tokens")
                    elsewhere = torch.cat([moved[:start], moved[end:]])
                    if not bool((elsewhere <= LEAK).all()):
                        raise Differs("lets a document move another's outputs", float(elsewhere.max()))


def check_gradients(make: MakeStages, reference: Reference, num_stages: int) -> None:
    """Of every parameter, over all microbatches."""
    stages = make(num_stages)
    for stage in stages:
        stage.zero_grad()
    for microbatch in reference.microbatches:
        _train_on(stages, microbatch)
    copies: dict[str, list[nn.Parameter]] = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            copies.setdefault(name, []).append(parameter)
    _assert_names("parameters", copies, dict(reference.model.named_parameters()))
    known = {id(stage.tied_embedding) for stage in stages} | {id(p) for stage in stages for _, p in stage.replicated}
    largest = max(gradient.abs().max().item() for gradient in reference.gradients.values())
    for name, parameters in copies.items():
        if len(parameters) > 1 and not all(id(parameter) in known for parameter in parameters):
            raise Differs(f"has {name} on several stages, which do not know of each other")
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        wanted = reference.gradients.get(name, torch.zeros_like(parameters[0]))
        got = torch.stack(found).sum(0) if found else torch.zeros_like(wanted)
        scale = max(wanted.abs().max().item(), 1e-3 * largest)
        if not (got - wanted).abs().max() <= GRADIENT_TOLERANCE * scale:
            raise Differs(f"has a wrong gradient of {name}", float((got - wanted).abs().max() / scale))


def _train_on(stages: list[Stage], microbatch: Microbatch) -> None:
    """As between processes: only hidden states and their gradients cross."""
    batch, received, sent = PackedBatch(microbatch.lengths, CPU), None, []
    leaves: list[Tensor] = []
    for stage in stages:
        sent.append(stage(microbatch.row, batch, received))
        received = sent[-1].detach().requires_grad_()
        leaves.append(received)
    (stages[-1].logits(leaves[-1]) * microbatch.weights).sum().backward()
    for out, leaf in zip(reversed(sent), reversed(leaves), strict=True):
        out.backward(leaf.grad)


def check_decode(make: MakeStages, reference: Reference, num_stages: int) -> None:
    """Generation's passes, with tokens that are known."""
    stages, microbatch = make(num_stages), reference.microbatches[0]
    documents = [document[0] for document in microbatch.documents]
    logits = microbatch.logits[0].split(microbatch.lengths)
    caches = [KVCache(3, max(microbatch.lengths)) for _ in stages]
    rows: list[tuple[int, int]] = []  # of each live row: the document, and how much of it is in the cache

    def step(keep: Sequence[int], joining: Sequence[tuple[int, int]] = ()) -> None:
        for cache in caches:
            cache.keep(list(keep))
        passed = [(rows[at][0], rows[at][1] + 1, 1) for at in keep] + [(at, size, size) for at, size in joining]
        rows[:] = [(at, end) for at, end, _ in passed]
        row, hidden = torch.cat([documents[at][end - size : end] for at, end, size in passed])[None], None
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.run(row, PackedPass.step(cache, tuple(size for _, size in joining), CPU), hidden)
        got = stages[-1].logits(hidden)[0]
        wanted = torch.cat([logits[at][end - size : end] for at, end, size in passed])
        _assert_close(got, wanted, "outputs of cached decode")

    with torch.inference_mode():
        step([], [(1, 7), (0, 2), (3, 12)])
        step([0, 1, 2])
        step([0, 1, 2])
        step([0, 2])  # one ends, and the last row moves
        step([0, 1], [(2, 1)])  # another joins
        step([1])
        for _ in range(4):
            step([0])
        step([], [(3, 21)])  # all end, and another joins
        step([0], [(0, 4), (1, 4)])  # one goes on: all rows that decode are equally long


def write_checkpoint(stages: list[Stage], directory: Path) -> None:
    """What the processes of all stages and the master do together."""
    files = [write_stage(stage, directory) for stage in stages]
    write_config(stages[0], directory)
    weight_map = {name: file.file for file in files for name in file.tensors}
    if len(weight_map) != sum(len(file.tensors) for file in files):
        raise Differs("saves a tensor twice")
    index = {"metadata": {"total_size": sum(file.size_bytes for file in files)}, "weight_map": weight_map}
    if len(stages) > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def check_save(make: MakeStages, reference: Reference, num_stages: int) -> None:
    """What stages write is what transformers would, and what another cut reads."""
    stages = make(num_stages)
    with TemporaryDirectory() as written:
        directory = Path(written)
        write_checkpoint(stages, directory)
        tensors, saved = (
            {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
            for folder in (directory, reference.directory)
        )
        _assert_names("saved tensors", tensors, saved)
        for name, tensor in saved.items():
            if not torch.equal(tensors[name], tensor):
                raise Differs(f"saves {name} with other bits")
        with hf_compat.quiet():
            reread = type(reference.model).from_pretrained(directory, dtype=torch.float32)
        found = reread.state_dict()
        for name, tensor in reference.model.state_dict().items():
            if not torch.equal(found[name], tensor):
                raise Differs(f"reads {name} again with other bits")


CHECKS = {
    Column.PACKED: check_packed,
    Column.GRADIENTS: check_gradients,
    Column.SAVE: check_save,
    Column.DECODE: check_decode,
}
"""Those of one number of stages."""


def logits_of(stages: list[Stage], row: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[1, T, V] of packed documents, row [1, T], in one autograd graph."""
    batch, hidden = PackedBatch(lengths, CPU), None
    for stage in stages:
        hidden = stage(row, batch, hidden)
    logits = stages[-1].logits(hidden)
    if logits.shape[:2] != row.shape:
        raise Differs("gives outputs of another shape")
    return logits


def _assert_close(got: Tensor, wanted: Tensor, what: str) -> None:
    difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE:
        raise Differs(f"has wrong {what}", difference)


def _assert_names(what: str, got: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    if missing := sorted(set(wanted) - set(got)):
        raise Differs(f"lacks {missing[0]} among its {what}")
    if extra := sorted(set(got) - set(wanted)):
        raise Differs(f"has {extra[0]} among its {what}, and the whole model has not")


def measure(model_type: str, with_switches: bool = True) -> Support:
    """What every check says on all of the type's tiny configurations. Raises LookupError if they lack a kind of layer.

    `with_switches`: tries the type's switches, too, one by one.
    """
    with TemporaryDirectory() as folder:
        configs = tiny_configs(model_type)
        try:
            references = [make_reference(config, Path(folder, str(at))) for at, config in enumerate(configs)]
        except AssertionError:
            return Support(model_type, None, "cannot be compared: transformers' own model refuses to be run whole")
        missing = missing_kinds([reference.model for reference in references])
        if missing:
            raise LookupError(f"{model_type}: no tiny configuration has a {', '.join(missing)}")
        best = _best_way(model_type, references)
        without = (
            _best_way(model_type, references[:1]) if len(references) > 1 and (best.way is None or best.fails) else best
        )
        if without != best and (name := _one_switch(configs)):
            reason = best.reason or next(iter(best.fails.values()))
            best = replace(without, unless={name: (not configs[0].get(name, False), reason)})
        if best.way is None or not with_switches:
            return best
        return replace(best, unless={**best.unless, **dict(wrong_switches(best, configs[0]))})


def _one_switch(configs: Sequence[dict[str, Any]]) -> str | None:
    """The name of the switch in which the only variant differs from the first configuration, if it is one."""
    names = [name for name in configs[1] if configs[0].get(name) != configs[1][name]]
    is_one = len(configs) == 2 and len(names) == 1 and isinstance(configs[1][names[0]], bool)
    return names[0] if is_one else None


def _best_way(model_type: str, references: Sequence[Reference]) -> Support:
    """A row is worth more than a cut, and a cut more than embeddings on one stage only."""
    in_rows = _measure_way(model_type, Way(), references)
    if in_rows.passes(Column.SPLIT):
        return in_rows
    if in_rows.way is not None:
        embedding = _measure_way(model_type, Way(embeds_everywhere=True), references)
        return embedding if embedding.passes(Column.SPLIT) else in_rows
    alone = _measure_way(model_type, Way(Packing.ALONE), references)
    if alone.way is None:
        return alone
    return replace(alone, fails={Column.PACKED: in_rows.reason, **alone.fails})


def _measure_way(model_type: str, way: Way, references: Sequence[Reference]) -> Support:
    fails: dict[Column, str] = {}
    makers = [stages_of(reference, way) for reference in references]

    def passes(column: Column, check: Check) -> bool:
        for make, reference in zip(makers, references, strict=True):
            if (fault := _fault(column, check, make, reference)) is not None:
                fails[column] = fault
                return False
        return True

    num_stages = 2 if passes(Column.SPLIT, check_split) else 1
    for column, check in CHECKS.items():
        if column is Column.DECODE and way.packing is Packing.ALONE:
            fails[column] = NO_CACHE
        elif not passes(column, partial(check, num_stages=num_stages)) and column is not Column.DECODE:
            return Support(model_type, None, fails[column])
    return Support(model_type, way, fails=fails)


def wrong_switches(support: Support, config: dict[str, Any]) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Those that the type takes, and with which a check fails that passes without, at one number of stages."""
    num_stages = 2 if support.passes(Column.SPLIT) else 1
    assert support.way is not None, "what does not run is not tried with switches"
    for name, value in flipped(config):
        with TemporaryDirectory() as folder:
            try:
                reference = make_reference(flip(config, name, value), Path(folder))
            except Exception as error:  # noqa: BLE001  (any refusal by foreign code: there is no such model)
                print(support.model_type, name, value, "cannot be made:", type(error).__name__, str(error)[:80])
                continue
            make = stages_of(reference, support.way)
            for column, check in CHECKS.items():
                if column is Column.DECODE and not support.passes(column):
                    continue
                fault = _fault(column, partial(check, num_stages=num_stages), make, reference)
                if fault is not None:
                    yield name, (value, fault)
                    break


def _fault(column: Column, check: Check, make: MakeStages, reference: Reference) -> str | None:
    """Why a check does not pass, for the table; None if it does."""
    model_type = reference.model.config.model_type
    try:
        check(make, reference)
    except Differs as error:
        print(model_type, column, error)
        return error.reason
    except TrainmasterError as error:
        return _reason(error, model_type, column)
    except Exception as error:  # noqa: BLE001  (foreign code, given what it does not expect)
        return f"raises {type(error).__name__} in the check of {column}"
    return None


def _reason(error: TrainmasterError, model_type: str, column: Column) -> str:
    """For the table: without the cure, and without what foreign code said when it got what it does not expect."""
    reason, _, _ = str(error).removeprefix(f"model type {model_type!r} ").partition("; ")
    if "cannot run as stage" in reason or "needs all of its modules" in reason:
        parts = {Column.SPLIT: "from hidden states alone", Column.PACKED: "on documents in one row"}
        return f"cannot run {parts.get(column, 'as a stage')}"
    return re.sub(r"^[A-Z]\w+ (?=[a-z])", "", reason)  # the name of a class


def stages_of(reference: Reference, way: Way) -> MakeStages:
    """Made once for each number."""
    return functools.cache(partial(load_all, reference.directory, way=way))


def load_all(directory: Path, num_stages: int, way: Way | None) -> list[Stage]:
    """All stages of a checkpoint, without dropout."""
    return [load_stage(directory, index, num_stages, CPU, way=way).eval() for index in range(num_stages)]
