"""Does a stage keep packed sequences apart? Asked of every stage before it is used, exactly and in a moment.

A row of two short sequences runs through the stage, and autograd says what depends on what. A dependence that must not
be is a gradient that is not *exactly* zero, so there is no tolerance to choose:

    second sequence on first        convolutions, recurrences, attention that ignores the batch
    token on later token            bidirectional attention
    layers on embeddings            per-layer inputs, which only the first stage could compute

The cost is a forward and two backward passes to the inputs (not to the parameters) over nine tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...api.errors import ModelError
from .attention import PackedBatch, packed_calls
from .cut import Absent, Inlet, Outlet
from .stage import Stage

LENGTHS = (5, 4)
