"""A TCP proxy that breaks on demand: between the worker and one of its servers, where a bad network would be.

It listens on one port for its whole life and forwards bytes unchanged and in order; what it can do to them is what
networks do: be gone, refuse, reset, hold still one way or both, delay, and carry little. It never alters, drops or
invents a byte of a connection that lives. One thread with an event loop of its own; the methods may be called from any
thread and return once the fault is in force. Used by the fault suite.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

LOOPBACK = "127.0.0.1"
_CHUNK = 16 * 1024
# Chunks of one connection under way in one direction: what a network's own buffers would hold.
_QUEUED = 64
_CALL_TIMEOUT_S = 10.0

WAYS = ("up", "down")
"""`up` is from the worker to the server, `down` is back."""


@dataclass(eq=False)
class _Connection:
    """One client's connection and its twin to the server."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    task: asyncio.Task[None] | None = None


class Proxy:
    """The way to the server on `upstream` (a port of this machine), open from `start` to `close`."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{upstream}", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._flow = {way: asyncio.Event() for way in WAYS}
        self._latency_s = 0.0
        self._bytes_per_s = 0.0
        self._refusing = False
        self._forgetting = False
        self.port = 0

    def start(self) -> None:
        """Begin to listen, on a free port."""
        self._thread.start()
        self._call(self._listen())
        self.heal()

    def close(self) -> None:
        """End every connection and the thread."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    def cut(self) -> None:
        """Be gone: connections are reset, new ones are refused."""
        self._call(self._cut())

    def reset(self) -> None:
        """Reset what is connected, and each new connection as soon as it is made."""
        self._do(self._reset)

    def stall(self, *ways: str) -> None:
        """Hold still, both ways unless `ways` names one; on `heal` every byte goes on its way."""
        self._do(lambda: self._hold(ways or WAYS, forget=False))

    def half_open(self) -> None:
        """Hold still both ways, as towards a host that died; `heal` resets the connections of before."""
        self._do(lambda: self._hold(WAYS, forget=True))

    def slow(self, *, latency_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """Delay every byte, and carry no more than so many a second on each way of a connection (0: any number)."""
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def heal(self) -> None:
        """Be a good network again."""
        self._call(self._heal())

    # On the loop's thread from here

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, LOOPBACK, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self._abort_all()

    def _reset(self) -> None:
        self._refusing = True
        self._abort_all()

    def _hold(self, ways: tuple[str, ...], *, forget: bool) -> None:
        self._forgetting = forget
        for way in ways:
            self._flow[way].clear()

    async def _heal(self) -> None:
        if self._forgetting:
            self._abort_all()
        self._refusing = self._forgetting = False
        self._latency_s = self._bytes_per_s = 0.0
        for event in self._flow.values():
            event.set()
        await self._listen()

    async def _end(self) -> None:
        await self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _abort_all(self) -> None:
        for connection in list(self._connections):
            _abort(connection.near)
            _abort(connection.far)
            if connection.task is not None:
                connection.task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _abort(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self._upstream)
        except OSError:
            _abort(writer)
            return
        connection = _Connection(writer, far_writer, asyncio.current_task())
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._carry(reader, far_writer, "up"))
                pumps.create_task(self._carry(far_reader, writer, "down"))
        except (asyncio.CancelledError, BaseExceptionGroup):
            pass  # aborted by a fault, or by one of its two ends: the other end is told below
        finally:
            self._connections.discard(connection)
            _abort(writer)
            _abort(far_writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """Carry one way of a connection. Its end, of whichever kind, raises, and so ends the other way as well."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(reader, queue))
            tasks.create_task(self._give(queue, writer, way))

    async def _take(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await reader.read(_CHUNK):
            await queue.put((self._loop.time() + self._latency_s, data))
        await queue.put((self._loop.time() + self._latency_s, b""))

    async def _give(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: str) -> None:
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            await self._flow[way].wait()
            if not data:
                raise ConnectionAbortedError
            writer.write(data)
            await writer.drain()
            if self._bytes_per_s:
                await asyncio.sleep(len(data) / self._bytes_per_s)

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def _do(self, work: Callable[[], None]) -> None:
        async def done() -> None:
            work()

        self._call(done())


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, so that the peer knows at once."""
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
