"""The pool's two threads with a name server and probes made up here; channels are made, and never connect."""

from __future__ import annotations

import socket
import threading

import pytest
from line_process import wait_until
from prometheus_client import generate_latest
from tritonclient.grpc import KeepAliveOptions
from tritonclient.grpc._client import MAX_GRPC_MESSAGE_SIZE

from pipeline.balance import Fault, Finding
from pipeline.errors import DependencyError, ModelMismatchError
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.replicas import CHANNEL, ReplicaPool, resolve
from pipeline.servers import Triton as TritonSettings


class Service:
    """What the name server says, and how each replica is; a change holds at the next question."""

    def __init__(self, **findings):
        self.findings = findings
        self.names = None
        self.metrics = Metrics()
        self.health = Health()

    def resolve(self, name):
        del name
        if isinstance(self.names, OSError):
            raise self.names
        return list(self.findings if self.names is None else self.names)

    def probe(self, client):
        address = client._channel._channel.target().decode().rpartition("/")[2]
        return self.findings.get(address, Finding.FAILED), "as the test says"

    def up(self):
        (sample,) = self.metrics.triton_replicas_up.collect()[0].samples
        return sample.value


@pytest.fixture
def make_pool():
    """Make pools of a service; each is closed at the end."""
    pools = []

    def make(service, address="triton:8001", **settings):
        settings = TritonSettings(address=address, **({"resolve_interval_s": 0.05, "startup_timeout_s": 5} | settings))
        pool = ReplicaPool(
            settings, service.probe, metrics=service.metrics, health=service.health, resolve=service.resolve
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def taken(pool, count):
    """Give the addresses of the next batches, each answered well."""
    addresses = set()
    for _ in range(count):
        replica, _ = pool.take(1)
        pool.give_back(replica, 1, None, "", first_try=True)
        addresses.add(replica.address)
    return addresses


def in_use(pool):
    """Give the addresses that would get a batch now."""
    with pool._changed:
        return [replica.address for replica in pool._balance.up]


def test_channel_arguments_keep_what_tritonclient_sets():
    """Arguments replace the library's defaults, so each of those is there again, with both message sizes."""
    ours = dict(CHANNEL)
    assert ours["grpc.max_send_message_length"] == ours["grpc.max_receive_message_length"] == MAX_GRPC_MESSAGE_SIZE
    for option in vars(KeepAliveOptions()):
        assert any(name.replace(".", "_").endswith(option) for name in ours), option


def test_every_address_of_a_name_is_used(make_pool):
    """A name that stands for two addresses gives two replicas, both in use, once the start returns."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD, "10.0.0.2:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    assert taken(pool, 4) == {"10.0.0.1:1", "10.0.0.2:1"}
    assert pool.require_all() == ["10.0.0.1:1", "10.0.0.2:1"]
    assert service.up() == 2


def test_each_replica_in_use_adds_its_room(make_pool):
    """`max_in_flight` is a replica's: with two of them twice as many batches are under way, with none there is no wait.

    Whoever waits for room goes on as soon as a batch is answered.
    """
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service, max_in_flight=2)
    assert pool.wait_for_room(0.0)
    pool.start()
    one, _ = pool.take(1)
    assert pool.wait_for_room(0.0)
    pool.take(1)
    assert not pool.wait_for_room(0.0)
    service.findings["10.0.0.2:1"] = Finding.GOOD
    assert pool.wait_for_room(20.0)
    assert [pool.take(1)[0].address for _ in range(2)] == ["10.0.0.2:1"] * 2
    assert not pool.wait_for_room(0.0)
    threading.Timer(0.1, pool.give_back, (one, 1, None, ""), {"first_try": True}).start()
    assert pool.wait_for_room(20.0)


def test_a_replica_that_was_late_has_room_for_fewer_frames(make_pool):
    """Half of what it had under way when it did not answer in time; nobody waits longer than there is room."""
    pool = make_pool(Service(**{"10.0.0.1:1": Finding.GOOD}))
    pool.start()
    replicas = [pool.take(8)[0] for _ in range(2)]
    assert pool.wait_for_room(0.0) > 8
    pool.give_back(replicas[0], 8, Fault.LATE, "Deadline Exceeded", first_try=True)
    assert pool.wait_for_room(0.0) == 0
    pool.give_back(replicas[1], 8, None, "", first_try=True)
    assert pool.wait_for_room(0.0) == 9


def test_a_new_address_is_used_and_a_lost_one_is_left(make_pool):
    """The name changes its addresses while the line runs: the next look-up holds, metrics and channels follow."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    pool.give_back(pool.take(1)[0], 1, None, "", first_try=True)
    service.findings = {"10.0.0.2:1": Finding.GOOD}
    wait_until(lambda: in_use(pool) == ["10.0.0.2:1"], 20, "the new replica alone")
    assert taken(pool, 4) == {"10.0.0.2:1"}
    wait_until(lambda: b"10.0.0.1" not in generate_latest(service.metrics.registry), 20, "the old one's counts gone")


def test_a_replica_that_has_left_answers_what_it_was_given(make_pool):
    """Its channel stays open until the request under way has ended."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    replica, client = pool.take(1)
    closed = threading.Event()
    close, client.close = client.close, lambda: (closed.set(), close())
    service.findings = {"10.0.0.2:1": Finding.GOOD}
    wait_until(lambda: in_use(pool) == ["10.0.0.2:1"], 20, "the new replica alone")
    assert not closed.wait(0.5)
    pool.give_back(replica, 1, None, "", first_try=True)
    assert closed.wait(20)


@pytest.mark.parametrize("names", [[], OSError("no such name")])
def test_a_name_server_that_fails_changes_nothing(make_pool, names):
    """With no answer, or an empty one, the last addresses hold, and the fault is named."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    service.names = names
    with pytest.raises(DependencyError, match="triton:8001"):
        wait_until(lambda: pool.require_all() == [], 20, "a complaint")
    assert taken(pool, 2) == {"10.0.0.1:1"}


def test_one_good_replica_is_enough_to_start(make_pool):
    """A refused and a dead replica are named by `require_all`, and get nothing."""
    findings = {"10.0.0.1:1": Finding.REFUSED, "10.0.0.2:1": Finding.GOOD, "10.0.0.3:1": Finding.FAILED}
    pool = make_pool(Service(**findings))
    pool.start()
    assert taken(pool, 4) == {"10.0.0.2:1"}
    with pytest.raises(ModelMismatchError, match=r"10\.0\.0\.1:1: as the test says; Triton at 10\.0\.0\.3:1"):
        pool.require_all()


def test_no_good_replica_is_no_start(make_pool):
    """When every replica serves another network the start fails at once; dead ones have the whole time."""
    with pytest.raises(ModelMismatchError, match=r"10\.0\.0\.1:1"):
        make_pool(Service(**{"10.0.0.1:1": Finding.REFUSED}), startup_timeout_s=600).start()
    with pytest.raises(DependencyError, match=r"10\.0\.0\.1:1") as caught:
        make_pool(Service(**{"10.0.0.1:1": Finding.FAILED}), startup_timeout_s=0.3).start()
    assert "triton.address" in caught.value.hint


def test_a_name_that_is_not_known_is_no_start(make_pool):
    """The message names the name and what the resolver said."""
    service = Service()
    service.names = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(DependencyError, match="triton:8001: its name is not known: Name or service"):
        make_pool(service, startup_timeout_s=0.3).start()


def test_readiness_follows_the_last_replica(make_pool):
    """With no replica in use the worker is not ready and hands out nothing; a probe brings both back."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    assert service.health.missing() == []
    service.findings["10.0.0.1:1"] = Finding.FAILED
    replica, _ = pool.take(1)
    assert not pool.give_back(replica, 1, Fault.GONE, "Socket closed", first_try=False)
    assert pool.take(1) is None
    assert (service.health.missing(), service.up()) == (["triton"], 0)
    service.findings["10.0.0.1:1"] = Finding.GOOD
    wait_until(lambda: service.health.missing() == [], 20, "a replica in use")
    assert taken(pool, 1) == {"10.0.0.1:1"}


def test_requests_and_failures_are_counted_per_replica(make_pool):
    """Prometheus sees both counts under the replica's address."""
    service = Service(**{"10.0.0.1:1": Finding.GOOD})
    pool = make_pool(service)
    pool.start()
    for fault in (None, None, Fault.BUSY):
        pool.give_back(pool.take(1)[0], 1, fault, "full", first_try=True)
    shown = generate_latest(service.metrics.registry).decode()
    assert 'inspection_triton_requests_total{replica="10.0.0.1:1"} 3.0' in shown
    assert 'inspection_triton_failures_total{replica="10.0.0.1:1"} 1.0' in shown


def test_a_closed_pool_hands_out_nothing(make_pool):
    """After `close` there is no replica, and both threads have ended."""
    pool = make_pool(Service(**{"10.0.0.1:1": Finding.GOOD}))
    pool.start()
    pool.close()
    assert pool.take(1) is None
    assert not any(thread.is_alive() for thread in pool._threads)


def test_a_headless_name_gives_every_address_of_one_kind(monkeypatch):
    """Two pods with both kinds of address are two replicas; with IPv6 alone they are two as well."""
    four = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.0.0.{number}", 8001)) for number in (1, 2, 1)]
    six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (f"fd00::{number}", 8001, 0, 0)) for number in (1, 2, 1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: six + four)
    assert resolve("triton:8001") == ["10.0.0.1:8001", "10.0.0.2:8001"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: six)
    assert resolve("triton:8001") == ["[fd00::1]:8001", "[fd00::2]:8001"]


def test_the_systems_resolver_gives_each_address_once():
    """Numbers stand for themselves; a name gives IPv4 where it has both; one that does not exist raises OSError."""
    assert resolve("127.0.0.1:8001") == ["127.0.0.1:8001"]
    assert resolve("[::1]:8001") == ["[::1]:8001"]
    assert resolve("localhost:8001") == ["127.0.0.1:8001"]
    with pytest.raises(OSError, match=r".+"):
        resolve("no-such-host.invalid:8001")
