"""A dataset's stream as the master sees it: the next sequences' metadata, fetched while the present step computes."""

from __future__ import annotations

from ..api.batch import Samples
from .dispatch import settle
from .executor import DATA_RANK
from .rpc.commands import Fetch, Fetched
from .rpc.messages import Lane
from .rpc.peer import Asked
from .rpc.server import Server
from .storage import Storage


class SampleStream:
    """Sequences of one dataset, in stream order. `position` is all there is to resume from."""

    def __init__(self, server: Server, storage: Storage, graph: str, deadline_s: float) -> None:
        self._server, self._storage, self._graph, self._deadline_s = server, storage, graph, deadline_s
        self.position = 0
        self._ahead: tuple[int, Asked] | None = None

    async def take(self, step: int, count: int) -> Samples:
        """The next `count` sequences, for this step, now in the data worker's store."""
        self.prefetch(step, count)
        assert self._ahead is not None, "prefetched"
        wanted, asked = self._ahead
        assert wanted == count, f"{wanted} sequences were prefetched, {count} are taken"
        (answers,) = await settle(self._server, asked)
        self._ahead = None
        self.position += count
        fetched = answers[DATA_RANK].success.result
        assert isinstance(fetched, Fetched), "Fetch is answered by Fetched"
        self._storage.add(DATA_RANK, fetched.samples)
        return fetched.samples

    def prefetch(self, step: int, count: int) -> None:
        """Asks for the next `count` sequences without waiting."""
        if self._ahead is None:
            fetch = Fetch(graph=self._graph, start=self.position, count=count)
            asked = self._server.ask(
                {DATA_RANK: fetch},
                name=f"fetch {self._graph} data",
                deadline_s=self._deadline_s,
                lane=Lane.TRANSFER,
                step=step,
            )
            self._ahead = count, asked
