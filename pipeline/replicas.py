"""The replicas of Triton behind one name: finds them, keeps a channel to each, probes them, hands them out in turn.

gRPC's own round robin asks the name server again only when a connection breaks, so a replica that is added stays idle;
here the name is asked every few seconds, and each address has a channel of its own. Two threads: one asks for names,
which can block as long as the system's resolver likes, and one probes. Knows no tensors and judges nothing. Called by
`inference`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

import grpc
import structlog
from tritonclient.grpc import InferenceServerClient

from pipeline.balance import Balance, Fault, Finding, Replica, Standing
from pipeline.errors import ConfigError, DependencyError, ModelMismatchError
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Tls
from pipeline.servers import Triton as TritonSettings

Probe = Callable[[InferenceServerClient], tuple[Finding, str]]
"""Says how a replica is, and why; bounded in time, and raises nothing."""
Resolve = Callable[[str], Sequence[str]]
"""Turns `host:port` into addresses `ip:port`; raises OSError."""

PROBES = "triton-probes"
"""The stage that probes; a probe of many products says itself that it comes round."""
_TICK_S = 0.1
_JOIN_S = 3.0
_LARGEST_MESSAGE = 2**31 - 1
# Given as a whole: channel arguments replace every default of tritonclient, its message sizes included (gRPC's own is
# 4 MB). A ping every 20 s while requests are under way notices a dead host; Triton's default tolerates that many. The
# address is a number that no list of proxy exceptions knows, so proxies are off. A channel tries again every second at
# least: gRPC's own pauses grow to two minutes, which a replica that is back must not wait.
CHANNEL = [
    ("grpc.max_send_message_length", _LARGEST_MESSAGE),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]
_UNREACHABLE = "start it (`logicrd stack up`), or correct triton.address in the line file"
_MISMATCH = "export the product again, and let Triton load that version"

log = structlog.get_logger(__name__)


class ReplicaPool:
    """Replicas at work between `start` and `close`; `take` and `give_back` from every thread, without waiting."""

    def __init__(
        self, settings: TritonSettings, probe: Probe, *, metrics: Metrics, health: Health, resolve: Resolve
    ) -> None:
        self._settings = settings
        self._probe = probe
        self._metrics = metrics
        self._health = health
        self._resolve = resolve
        self._credentials: grpc.ChannelCredentials | None = None
        self._balance = Balance(settings.max_in_flight)
        self._clients: dict[Replica, InferenceServerClient] = {}
        self._known: dict[str, Sequence[str]] = {}
        self._name_faults: dict[str, str] = {}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow_names, name="triton-names", daemon=True),
            threading.Thread(target=self._follow_replicas, name=PROBES, daemon=True),
        ]

    def start(self) -> None:
        """Find and probe every replica; returns when each has been probed and one can be used.

        Raises DependencyError when none can within the start's time, ModelMismatchError when one serves another model,
        ConfigError for a file of `tls` that cannot be read.
        """
        if self._settings.tls is not None:
            self._credentials = credentials(self._settings.tls)
        self._health.beat(PROBES)
        for thread in self._threads:
            thread.start()
        with self._changed:
            self._changed.wait_for(self._settled, self._settings.startup_timeout_s)
            if not self._balance.up:
                self._complain(self._balance.replicas)

    def require_all(self) -> list[str]:
        """Give the address of every replica. Raises as `start` does when one of them cannot be used."""
        with self._changed:
            bad = [replica for replica in self._balance.replicas if replica.standing is not Standing.UP]
            if bad or self._name_faults:
                self._complain(bad)
            return [replica.address for replica in self._balance.replicas]

    def in_use(self) -> list[tuple[Replica, InferenceServerClient]]:
        """List the replicas that get batches, each with its channel."""
        with self._changed:
            return [(replica, self._clients[replica]) for replica in self._balance.up]

    def probe_again(self) -> None:
        """Ask every replica in use once more how it is."""
        with self._changed:
            self._balance.suspect_all(time.monotonic())

    def close(self) -> None:
        """Close every channel; requests under way end as cancelled."""
        self._stop.set()
        with self._changed:
            clients = list(self._clients.values())
        for client in clients:
            client.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_JOIN_S)

    def wait_for_room(self, timeout_s: float) -> int:
        """Wait until a replica holds fewer than `max_in_flight` batches and may have more frames under way; gives how
        many the next batch may have, any number at once when none is in use, 0 after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(self._balance.room, timeout_s)

    def is_idle(self) -> bool:
        """Whether a replica in use has nothing to do at this moment."""
        with self._changed:
            return any(replica.in_flight == 0 for replica in self._balance.up)

    def take(self, frames: int, avoid: Replica | None = None) -> tuple[Replica, InferenceServerClient] | None:
        """Give the replica for the next request, of so many frames; another than `avoid` where there is one, None when
        all are down."""
        with self._changed:
            replica = None if self._stop.is_set() else self._balance.take(avoid, frames=frames)
            return None if replica is None else (replica, self._clients[replica])

    def give_back(self, replica: Replica, frames: int, fault: Fault | None, words: str, *, first_try: bool) -> bool:
        """Say how a request of so many frames to a replica ended; gives whether to send it again, which a second one
        never is."""
        self._metrics.triton_request(replica.address, failed=fault is not None)
        with self._changed:
            before = replica.standing
            now_s = time.monotonic()
            again = self._balance.give_back(replica, fault, words, now_s, first_try=first_try, frames=frames)
            self._note(replica, before)
            self._changed.notify_all()
        return again

    # Thread for names

    def _follow_names(self) -> None:
        while not self._stop.is_set():
            try:
                self._ask_names()
            except Exception:  # the thread's top frame: the replicas stay as they are, and the fault is seen
                log.exception("finding Triton's replicas failed")
            self._stop.wait(self._settings.resolve_interval_s)

    def _ask_names(self) -> None:
        """Ask for every name; one without an answer keeps the addresses that it had."""
        for name in self._settings.addresses:
            try:
                found = self._resolve(name)
            except (OSError, UnicodeError) as error:
                self._lose_name(name, f"its name is not known: {getattr(error, 'strerror', None) or error}")
                continue
            if not found:
                self._lose_name(name, "its name stands for no address")
                continue
            self._known[name] = found
            if self._name_faults.pop(name, None):
                log.info("name of Triton found again", name=name)
            # After each name: the next one may take long.
            self._take_addresses([address for addresses in self._known.values() for address in addresses])

    def _lose_name(self, name: str, fault: str) -> None:
        if name not in self._name_faults:
            log.warning("name of Triton not found: its last addresses hold", name=name, error=fault)
        with self._changed:
            self._name_faults[name] = fault
            self._changed.notify_all()

    def _take_addresses(self, addresses: list[str]) -> None:
        with self._changed:
            if self._stop.is_set():  # a look-up that outlasted the end: nobody would close its channels
                return
            joined, left = self._balance.see(addresses)
            for replica in joined:
                name = next(name for name, found in self._known.items() if replica.address in found)
                self._clients[replica] = connect(name, replica.address, self._credentials)
                log.info("Triton replica found", replica=replica.address)
            for replica in left:
                log.info("Triton replica has left", replica=replica.address)
            self._report_up()
            self._changed.notify_all()

    # Thread for probes

    def _follow_replicas(self) -> None:
        while not self._stop.is_set():
            self._health.beat(PROBES)
            try:
                self._probe_due()
                self._close_left()
            except Exception:  # the thread's top frame: the replicas stay as they are, and the fault is seen
                log.exception("probing Triton's replicas failed")
            self._stop.wait(_TICK_S)
        self._health.retire(PROBES)

    def _probe_due(self) -> None:
        with self._changed:
            due = [(replica, self._clients[replica]) for replica in self._balance.due(time.monotonic())]
        for replica, client in due:
            self._health.beat(PROBES)
            finding, words = self._probe(client)
            if self._stop.is_set():
                return
            with self._changed:
                before = replica.standing
                self._balance.found(replica, finding, words, time.monotonic())
                self._note(replica, before)
                self._changed.notify_all()

    def _close_left(self) -> None:
        """Close the channels of replicas that have left, once their last request is answered."""
        with self._changed:
            stay = set(self._balance.replicas)
            gone = [replica for replica in self._clients if replica not in stay and not replica.in_flight]
            clients = [(replica.address, self._clients.pop(replica)) for replica in gone]
        for address, client in clients:
            client.close()
            self._metrics.triton_replica_left(address)

    # Under the lock

    def _note(self, replica: Replica, before: Standing) -> None:
        """Tell of a change, once."""
        if replica.standing is before or self._stop.is_set():
            return
        self._report_up()
        if replica.standing is Standing.UP:
            log.info("Triton replica is up", replica=replica.address)
        else:
            standing = replica.standing.value
            log.warning("Triton replica is not used", replica=replica.address, standing=standing, error=replica.fault)

    def _report_up(self) -> None:
        count = len(self._balance.up)
        self._metrics.triton_replicas_up.set(count)
        self._health.ready("triton", state=count > 0)

    def _settled(self) -> bool:
        """Whether waiting longer at the start is of no use."""
        standings = {replica.standing for replica in self._balance.replicas}
        found = len(self._known) + len(self._name_faults) >= len(self._settings.addresses)
        return found and Standing.NEW not in standings and (Standing.UP in standings or standings == {Standing.REFUSED})

    def _complain(self, bad: list[Replica]) -> None:
        """Raise for replicas that cannot be used, each by name."""
        faults = {replica.address: replica.fault for replica in bad} | self._name_faults
        if not faults:
            faults = dict.fromkeys(self._settings.addresses, "its name is still being looked up")
        words = "; ".join(f"Triton at {address}: {fault}" for address, fault in faults.items())
        if any(replica.standing is Standing.REFUSED for replica in bad):
            raise ModelMismatchError(words, hint=_MISMATCH)
        raise DependencyError(words, hint=_UNREACHABLE)


def connect(name: str, address: str, by: grpc.ChannelCredentials | None) -> InferenceServerClient:
    """Make a channel to an address of the name `host:port`. By TLS the replica has to prove that name: its address is a
    number."""
    if by is None:
        return InferenceServerClient(address, channel_args=CHANNEL)
    host = name.rpartition(":")[0].strip("[]")
    own = [("grpc.ssl_target_name_override", host), ("grpc.default_authority", host)]
    return InferenceServerClient(address, ssl=True, creds=by, channel_args=[*CHANNEL, *own])


def credentials(tls: Tls, block: str = "triton.tls") -> grpc.ChannelCredentials:
    """Read the files of `tls`, which the line file calls `block`. Raises ConfigError."""
    try:
        parts = [
            None if path is None else path.read_bytes() for path in (tls.ca_file, tls.key_file, tls.certificate_file)
        ]
    except OSError as error:
        raise ConfigError(f"{block}: {error.filename}: {error.strerror}", hint="a file in PEM") from None
    return grpc.ssl_channel_credentials(*parts)


def resolve(name: str) -> list[str]:
    """Ask the system for all addresses of `host:port`; raises OSError. Blocks as long as the system's resolver does.

    IPv4 addresses where there are any, else IPv6: a server that has both would count twice.
    """
    host, _, port = name.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    numbers = [address[0] for family, _, _, _, address in found if family == socket.AF_INET]
    if numbers:
        return [f"{number}:{port}" for number in dict.fromkeys(numbers)]
    return [f"[{address[0]}]:{port}" for address in dict.fromkeys(address for *_, address in found)]
