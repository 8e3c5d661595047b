"""What is done to models around a call, beside the call itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .record import record


@record
class Reshard:
    """Moves the weights of one model towards another's: `target = eta * source + (1 - eta) * target`.

    1 copies; less makes the target an exponential moving average of the source. In this version both models have the
    same layout on the same workers.
    """

    type: Literal["reshard"] = "reshard"
    source: str
    """The role of the model that gives."""
    target: str
    """The role of the model that changes; it is not trained."""
    eta: Annotated[float, Field(gt=0, le=1)] = 1.0


@record
class Offload:
    """Moves a model, and the state of its optimizer, to the host's memory until it is called again."""

    type: Literal["offload"] = "offload"
    model: str
    """Its role."""


ModelHook = Annotated[Reshard | Offload, Field(discriminator="type")]
