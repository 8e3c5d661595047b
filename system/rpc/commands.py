"""What a request asks of a worker, and what a worker answers: two closed unions, and the hooks around a command.

Commands carry names that the experiment file registered and metadata of samples; never code, never tensors.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, InstanceOf, NonNegativeInt

from ...api.batch import Samples
from ...api.hooks import Offload as Offload
from ...api.hooks import Reshard as Reshard
from ...api.record import record
from .parcels import Redistribute as Redistribute

Array = InstanceOf[np.ndarray]  # of any shape, and of the dtypes that the codec knows
"""Travels in a frame of its own, not copied."""

# -- hooks ------------------------------------------------------------------------------------------------------------


@record
class Save:
    """After a call: write this worker's shard of a model into a directory that the master publishes later."""

    type: Literal["save"] = "save"
    model: str
    directory: str
    with_optimizer: bool = False
    """The state of the model's optimizer, too."""


Hook = Annotated[Save | Reshard | Offload, Field(discriminator="type")]


@record
class ShardFile:
    """A `Save` hook's result: a file of tensors. Empty where another replica writes."""

    tensors: tuple[str, ...] = ()
    """The model's, by their names in the checkpoint: what its index is made of."""
    file: str = ""
    """Its path within the checkpoint."""
    size_bytes: NonNegativeInt = 0
    """Of the tensors."""
    sha256: str = ""
    """Of the file, in hexadecimal digits."""


# -- commands ---------------------------------------------------------------------------------------------------------


@record
class Echo:
    """Send this back: how long the way is, and whether a lane is free."""

    type: Literal["echo"] = "echo"
    text: str = ""
    content: tuple[Array, ...] = ()


@record
class HostStore:
    """Open the key-value store through which the workers' process groups meet."""

    type: Literal["host_store"] = "host_store"


@record
class JoinGroups:
    """Form every process group that this worker is a member of."""

    type: Literal["join_groups"] = "join_groups"
    store_host: str
    store_port: int


@record
class LoadModel:
    """Load this worker's shard of a model, and make its optimizer."""

    type: Literal["load_model"] = "load_model"
    model: str
    num_optimizer_steps: NonNegativeInt = 0
    """Of the whole run, if the model is trained: a learning rate may fall over them."""


@record
class OpenDataset:
    """Read the dataset of a graph, tokenise it, and check every sequence."""

    type: Literal["open_dataset"] = "open_dataset"
    graph: str


@record
class Fetch:
    """Put the sequences at `start ... start + count - 1` of a dataset's endless stream into the store."""

    type: Literal["fetch"] = "fetch"
    graph: str
    """The graph whose dataset it is."""
    start: NonNegativeInt
    count: NonNegativeInt


@record
class CallModel:
    """Run one model function call on this worker's data-parallel share."""

    type: Literal["call_model"] = "call_model"
    graph: str
    call: str
    """The call's name in that graph of the experiment, where its model and settings stand."""
    samples: Samples
    """This data-parallel rank's, in the order in which they enter the pipeline."""
    sizes: tuple[NonNegativeInt, ...]
    """Samples of each microbatch."""

    def __post_init__(self) -> None:
        if sum(self.sizes) != len(self.samples):
            raise ValueError(f"sizes add up to {sum(self.sizes)}, but there are {len(self.samples)} samples")


@record
class OpenFunction:
    """Start the processes of a function call."""

    type: Literal["open_function"] = "open_function"
    graph: str
    call: str


@record
class CallFunction:
    """Run one function call on whole groups."""

    type: Literal["call_function"] = "call_function"
    graph: str
    call: str
    samples: Samples


@record
class Release:
    """Forget these sequences: nobody reads them again."""

    type: Literal["release"] = "release"
    ids: tuple[str, ...]


Command = Annotated[
    Echo
    | HostStore
    | JoinGroups
    | LoadModel
    | OpenDataset
    | OpenFunction
    | Fetch
    | CallModel
    | CallFunction
    | Redistribute
    | Release,
    Field(discriminator="type"),
]


# -- results ----------------------------------------------------------------------------------------------------------


@record
class Echoed:
    type: Literal["echoed"] = "echoed"
    text: str = ""
    content: tuple[Array, ...] = ()


@record
class Done:
    """A command that has nothing to tell."""

    type: Literal["done"] = "done"


@record
class StoreAddress:
    type: Literal["store_address"] = "store_address"
    host: str
    port: int


@record
class ModelLoaded:
    type: Literal["model_loaded"] = "model_loaded"
    num_parameters: NonNegativeInt
    """On this worker's shard, tied copies not counted again."""
    reads_tokens: bool = True
    """Whether the shard has any use for token ids; it knows their number without them."""
    groups_used: tuple[NonNegativeInt, ...] = ()
    """Indices of the optimizer's groups that have a parameter on this worker's shard."""


@record
class DatasetOpened:
    type: Literal["dataset_opened"] = "dataset_opened"
    num_sequences: NonNegativeInt
    num_tokens: NonNegativeInt
    longest: NonNegativeInt
    longest_id: str


@record
class Fetched:
    type: Literal["fetched"] = "fetched"
    samples: Samples


@record
class Mean:
    """A weighted mean that can be merged: `total / weight`."""

    total: Annotated[float, Field(allow_inf_nan=True)]
    weight: float


@record
class CallDone:
    type: Literal["call_done"] = "call_done"
    statistics: dict[str, Mean]
    """Of the whole call, all data-parallel ranks; empty but on the worker that owns the call's outputs."""
    version: NonNegativeInt
    """Optimizer steps behind the model's weights, after the call."""
    outputs: Samples | None = None
    """New keys of sequences, that this worker holds now."""


@record
class Example:
    """A response as text, for people."""

    id: str
    prompt: str
    response: str
    reward: float | None


@record
class FunctionDone:
    type: Literal["function_done"] = "function_done"
    statistics: dict[str, Mean]
    outputs: Samples
    """New keys of sequences, that this worker holds now."""
    dropped: tuple[str, ...]
    """Sequences that leave the batch."""
    failures: tuple[str, ...]
    """What went wrong, by sample, in words."""
    examples: tuple[Example, ...]


Result = Annotated[
    Echoed | Done | StoreAddress | ModelLoaded | DatasetOpened | Fetched | CallDone | FunctionDone,
    Field(discriminator="type"),
]
