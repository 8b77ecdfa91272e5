"""A store far away: a proxy to a port of this machine, through which every byte comes so much later, each way.

It is the program, a process of its own: python -m rayseg.benchmark.delay PORT SECONDS. It prints its port.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 2**18


@contextmanager
def delayed(port: int, one_way_s: float) -> Iterator[int]:
    """Runs the proxy; yields its port on the loopback interface."""
    command = [sys.executable, "-m", __name__, str(port), str(one_way_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float) -> None:
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def arrive() -> None:
        while True:
            at, data = await under_way.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not data:
                return
            writer.write(data)
            await writer.drain()

    arriving = asyncio.create_task(arrive())
    with contextlib.suppress(OSError):
        while True:
            data = await reader.read(_CHUNK_BYTES)
            under_way.put_nowait((loop.time() + one_way_s, data))
            if not data:
                break
        await arriving
    arriving.cancel()
    writer.close()


async def _serve(port: int, one_way_s: float) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * one_way_s)  # to shake hands
        from_store, to_store = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pump(reader, to_store, one_way_s), _pump(from_store, writer, one_way_s))

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
