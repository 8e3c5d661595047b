"""Other systems' echoes, for `rpc.py`: Ray actors, torch.distributed.rpc, grpc.aio. Each needs only its own package.

What they carry is their own fastest form of the same bytes: Ray and torch pickle them, gRPC takes them as they are.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable
from typing import Any  # other systems' handles and futures

import rpc

MAX_MESSAGE_BYTES = 16 * 2**20


def run(side: str, seconds: float) -> dict[str, float]:
    return {"ray": run_ray, "torch_rpc": run_torch_rpc, "grpc": run_grpc}[side](seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- Ray --------------------------------------------------------------------------------------------------------------


def run_ray(seconds: float) -> dict[str, float]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

    @ray.remote(num_cpus=1)
    class Echo:
        def echo(self, payload: bytes) -> bytes:
            return payload

    with rpc.children_pinned():
        ray.init(num_cpus=rpc.NUM_WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        actors = [Echo.remote() for _ in range(rpc.NUM_WORKERS)]
        ray.get([actor.echo.remote(b"") for actor in actors])

    async def main() -> dict[str, float]:
        async def call(rank: int, payload: bytes) -> Any:
            return await actors[rank].echo.remote(payload)

        return await rpc.measure(call, bytes(rpc.SMALL_BYTES), bytes(rpc.LARGE_BYTES), seconds)

    try:
        return asyncio.run(main())
    finally:
        ray.shutdown()


# -- torch.distributed.rpc --------------------------------------------------------------------------------------------


def echo(payload: bytes) -> bytes:
    return payload


def torch_worker(rank: int, port: int) -> None:
    from torch.distributed import rpc as torch_rpc

    torch_rpc.init_rpc(
        f"worker-{rank}", rank=rank + 1, world_size=rpc.NUM_WORKERS + 1, rpc_backend_options=torch_options(port)
    )
    torch_rpc.shutdown()


def torch_options(port: int) -> Any:
    from torch.distributed import rpc as torch_rpc

    return torch_rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4, init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=120
    )


def run_torch_rpc(seconds: float) -> dict[str, float]:
    from torch.distributed import rpc as torch_rpc

    port = free_port()
    with rpc.worker_processes(torch_worker, port):
        torch_rpc.init_rpc("master", rank=0, world_size=rpc.NUM_WORKERS + 1, rpc_backend_options=torch_options(port))

        async def main() -> dict[str, float]:
            loop = asyncio.get_running_loop()

            def call(rank: int, payload: bytes) -> Awaitable[Any]:
                answer: asyncio.Future[bytes] = loop.create_future()

                def arrived(future: Any) -> None:
                    loop.call_soon_threadsafe(answer.set_result, future.value())

                torch_rpc.rpc_async(f"worker-{rank}", echo, args=(payload,)).add_done_callback(arrived)
                return answer

            return await rpc.measure(call, bytes(rpc.SMALL_BYTES), bytes(rpc.LARGE_BYTES), seconds)

        figures = asyncio.run(main())
        torch_rpc.shutdown()
    return figures


# -- gRPC -------------------------------------------------------------------------------------------------------------

GRPC_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]


def grpc_worker(rank: int, ports: list[int]) -> None:
    import grpc

    async def answer(request: bytes, _: Any) -> bytes:
        if not request:
            stopped.set()
        return request

    async def main() -> None:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        method = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": method}),))
        server.add_insecure_port(f"127.0.0.1:{ports[rank]}")
        await server.start()
        await stopped.wait()
        await server.stop(grace=1)

    stopped = asyncio.Event()
    asyncio.run(main())


def run_grpc(seconds: float) -> dict[str, float]:
    import grpc

    ports = [free_port() for _ in range(rpc.NUM_WORKERS)]

    async def main() -> dict[str, float]:
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) for port in ports]
        await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), 60)
        methods = [channel.unary_unary("/bench.Echo/Echo") for channel in channels]

        async def call(rank: int, payload: bytes) -> bytes:
            answer: bytes = await methods[rank](payload)
            return answer

        figures = await rpc.measure(call, bytes(rpc.SMALL_BYTES), bytes(rpc.LARGE_BYTES), seconds)
        for rank, channel in enumerate(channels):
            await call(rank, b"")
            await channel.close()
        return figures

    with rpc.worker_processes(grpc_worker, ports):
        return asyncio.run(main())
