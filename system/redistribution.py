"""The planner: from who holds what and who needs what to parcels between workers. Pure.

    needs, storage, hosts --demand--> cells that are lacking, by host --routing--> hops --parcelling--> messages

A worker receives what it needs and does not hold, once, and no more; what a host lacks enters it once; nobody has much
more to send than others, also where one worker holds everything. Each worker is told of its own parcels only. The plan
depends on ranks, hosts, needs and holders, not on the order in which they are given or came to be; but for who of
several holders sends, which turns on what else is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..api.graph import ModelFunctionCall
from ..api.remap import input_keys
from .demand import Needs, demand_of
from .parcelling import parcel_out
from .routing import route
from .rpc.parcels import Redistribute
from .storage import Storage

TOKEN_KEYS = ("tokens", "prompt")
"""By the algorithm's names. All other keys are read by the last stage only."""


def keys_of_stage(call: ModelFunctionCall, is_last: bool, reads_tokens: bool) -> tuple[str, ...]:
    """Which of a call's inputs a stage reads, by the graph's names."""
    return tuple(key for name, key in input_keys(call).items() if is_last or (reads_tokens and name in TOKEN_KEYS))


def plan_redistribution(needs: Needs, storage: Storage, tag: int, hosts: Sequence[str] = ()) -> dict[int, Redistribute]:
    """`needs` by rank: samples, and the keys of them that it reads; `hosts` by rank, by default one for all.

    Workers that need the same should be given the same object of samples: it is looked at once. Returns each worker's
    part, if it has one; waves are 0 to 3. Raises `RunError` naming sequence and key if nobody holds what is needed.
    """
    demand = demand_of(needs, storage, hosts)
    return parcel_out(demand, route(demand), tag) if len(demand.cell) else {}
