"""The proxy does what it says to a real connection, and never alters, drops or invents a byte of one that lives."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from integration.faults.proxy import LOOPBACK, Proxy
from line_process import wait_until

_BYTES = bytes(range(256)) * 2048


class Echo:
    """A server that sends back what it gets, and counts it."""

    def __init__(self) -> None:
        self.received = 0
        self._server = socket.create_server((LOOPBACK, 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # a thread that waits in `accept` would keep it open
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += len(data)
                    connection.sendall(data)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    """The server behind the proxy."""
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    """A proxy before it."""
    proxy = Proxy(echo.port)
    proxy.start()
    yield proxy
    proxy.close()


def connected(proxy: Proxy) -> socket.socket:
    connection = socket.create_connection((LOOPBACK, proxy.port), timeout=10)
    assert echoed(connection, b"hello") == b"hello"
    return connection


def refused(proxy: Proxy) -> None:
    """A new connection is reset at once: while it is made, or when it is first read."""
    with (
        pytest.raises(ConnectionResetError),
        closing(socket.create_connection((LOOPBACK, proxy.port), timeout=10)) as connection,
    ):
        connection.recv(1)


def echoed(connection: socket.socket, data: bytes) -> bytes:
    """Send, and read as much as was sent."""
    sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    sender.start()
    found = read(connection, len(data))
    sender.join(10)
    return found


def read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = connection.recv(65536)
        assert data, "the connection has ended"
        found += data
    return found


def test_it_carries_every_byte_in_order(proxy):
    """Half a megabyte there and back, as it is and under latency."""
    with closing(connected(proxy)) as connection:
        assert echoed(connection, _BYTES) == _BYTES
        proxy.slow(latency_s=0.05)
        assert echoed(connection, _BYTES) == _BYTES
        proxy.heal()
        assert echoed(connection, _BYTES) == _BYTES


def test_latency_delays_either_way(proxy):
    """An answer takes twice the latency."""
    with closing(connected(proxy)) as connection:
        proxy.slow(latency_s=0.2)
        began_s = time.monotonic()
        assert echoed(connection, b"late") == b"late"
        assert time.monotonic() - began_s >= 0.4


def test_a_throttle_carries_no_more_than_it_says(proxy):
    """64 KiB at 128 KiB a second take the time that they must, less the one chunk that goes free."""
    with closing(connected(proxy)) as connection:
        proxy.slow(bytes_per_s=128 * 1024)
        began_s = time.monotonic()
        data = _BYTES[: 64 * 1024]
        assert echoed(connection, data) == data
        assert time.monotonic() - began_s >= 0.35


def test_a_stall_holds_everything_and_loses_nothing(proxy, echo):
    """Nothing arrives inside, everything afterwards, on the same connection."""
    with closing(connected(proxy)) as connection:
        proxy.stall()
        before = echo.received
        connection.sendall(b"patience")
        time.sleep(0.3)
        assert echo.received == before
        proxy.heal()
        assert read(connection, 8) == b"patience"


def test_a_stall_of_answers_lets_requests_through(proxy, echo):
    """The server gets it, the client does not hear of it."""
    with closing(connected(proxy)) as connection:
        proxy.stall("down")
        before = echo.received
        connection.sendall(b"done?")
        wait_until(lambda: echo.received == before + 5, 10, "the request at the server")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(5)
        proxy.heal()
        connection.settimeout(10)
        assert read(connection, 5) == b"done?"


def test_a_cut_resets_and_refuses(proxy):
    """The connection is reset, a new one is refused, and after `heal` the same port serves again."""
    with closing(connected(proxy)) as connection:
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, proxy.port), timeout=10)
    proxy.heal()
    connected(proxy).close()


def test_a_reset_ends_each_new_connection(proxy):
    """It is accepted, and reset at once."""
    with closing(connected(proxy)) as connection:
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    refused(proxy)
    proxy.heal()
    connected(proxy).close()


def test_a_half_open_connection_looks_alive_until_it_is_reset(proxy, echo):
    """Nothing comes through, no error either; the end of the fault resets it."""
    with closing(connected(proxy)) as connection:
        proxy.half_open()
        before = echo.received
        connection.sendall(b"anybody?")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.received == before
        connection.settimeout(10)
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    connected(proxy).close()


def test_a_server_that_is_away_resets_its_clients(proxy, echo):
    """Nobody listens behind the proxy: the client hears of it at once."""
    echo.close()
    refused(proxy)
