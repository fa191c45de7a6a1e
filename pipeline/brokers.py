"""How the line reaches Kafka: what every client is told of the brokers, and what it means when they refuse.

A client of the library retries whatever happens and says in the end that time is up. `unreachable` asks once more, on a
connection of its own, and names the cause. `poll` reads on past records that the library cannot read. Keeps no
connection. Called by every module that has a client.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer
from kafka.errors import (
    AuthorizationError,
    CorruptRecordError,
    IllegalSaslStateError,
    InvalidReceiveError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    SaslAuthenticationFailedError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
    UnsupportedSaslMechanismError,
)
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from pipeline.cameras import read_secret
from pipeline.errors import ConfigError, DependencyError
from pipeline.servers import Kafka, Sasl, Tls

_PROBE_MS = 5_000
_HANGING_UP = (SaslAuthenticationFailedError, UnsupportedSaslMechanismError, InvalidReceiveError)
_START = "start it (`logicrd stack up` makes the topics too), or correct kafka.bootstrap in the line file"
_NO_TLS = "this port speaks no TLS", "name the TLS port in kafka.bootstrap, or remove kafka.tls"
# What the text of a failed TLS handshake holds, what that is and what to do about it: the library's errors have no
# codes. The first that fits.
_TLS_FAULTS = (
    ("mismatch", ("", "name the broker in kafka.bootstrap as its certificate does")),
    (
        "CERTIFICATE_VERIFY_FAILED",
        ("", "put the authority that signed the broker's certificate into kafka.tls.ca_file"),
    ),
    ("ALERT", ("", "the broker refuses this side of TLS: give it kafka.tls.certificate_file and key_file")),
    ("WRONG_VERSION_NUMBER", _NO_TLS),
    ("EOF", _NO_TLS),
)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that the library cannot read, as a header's name that is no UTF-8; what is in it stays unknown."""

    topic: str
    partition: int
    offset: int
    error: str
    key: None = None
    value: None = None
    headers: tuple[tuple[str, bytes], ...] = ()


def client_options(settings: Kafka) -> dict[str, Any]:
    """Give what every client of the library has to know to reach the brokers; what it does there is its own.

    The result holds the password. Raises ConfigError for a file that cannot be used.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap,
        "bootstrap_timeout_ms": int(settings.startup_timeout_s * 1e3),
        "security_protocol": _protocol(settings),
        "allow_auto_create_topics": False,
    }
    if settings.tls is not None:
        options["ssl_context"] = _context(settings.tls)
    if settings.sasl is not None:
        options |= _login(settings.sasl)
    return options


def poll(consumer: KafkaConsumer, timeout_ms: int) -> list[Any]:
    """Give the next records, each the library's own or an `Unreadable`. Raises KafkaError for everything else."""
    try:
        polled = consumer.poll(timeout_ms=timeout_ms)
    except (CorruptRecordError, UnsupportedCodecError) as error:
        return [_stepped_over(consumer, error)]
    return [record for records in polled.values() for record in records]


def _stepped_over(consumer: KafkaConsumer, error: KafkaError) -> Unreadable:
    """Set the consumer behind what it cannot read: the library's next `poll` would never return.

    Its batch is read again from the next offset, so that all that follows in that batch, which the library cannot
    reach, is told one by one.
    """
    batch = consumer._fetcher._next_partition_records  # the library's own, for its error does not say where
    if not batch:
        raise error
    place, offset = batch.topic_partition, batch.next_fetch_offset
    consumer.seek(place, offset + 1)
    return Unreadable(place.topic, place.partition, offset, f"unreadable: {error}")


def unreachable(settings: Kafka, error: KafkaError) -> DependencyError:
    """Make the error that tells the operator why Kafka failed, and what to do. Blocks for some seconds at most."""
    answer = _Answer(error, greeted=True)
    if isinstance(error, (KafkaTimeoutError, KafkaConnectionError)):
        answer = _ask(settings)
    text, hint = _explained(settings, answer.error or error, greeted=answer.greeted)
    return DependencyError(f"Kafka at {', '.join(settings.bootstrap)}: {text}", hint=hint)


def no_topic(settings: Kafka, topic: str, *, hint: str = "`logicrd stack up` makes it") -> DependencyError:
    """Make the error for a topic that a consumer does not find: is it not there, or not for this user? Blocks alike."""
    if isinstance(error := _ask(settings, topic).error, AuthorizationError):
        return unreachable(settings, error)
    return DependencyError(f"Kafka has no topic {topic}", hint=hint)


def _explained(settings: Kafka, error: KafkaError, *, greeted: bool) -> tuple[str, str]:
    """Say what a refusal is and what to do about it."""
    text = str(error) or type(error).__name__
    who = "this line" if settings.sasl is None else f"user {settings.sasl.username!r}"
    if isinstance(error, AuthorizationError):
        return f"{who} may not: {text}", "give it the right by an ACL of Kafka (`kafka-acls --add`); README lists them"
    if isinstance(error, IllegalSaslStateError):
        return "this port asks for no login", "name the port that does in kafka.bootstrap, or remove kafka.sasl"
    for word, (what, hint) in _TLS_FAULTS:
        if "SSL" in text and word in text:
            return what or text, hint
    # A broker tells what is wrong and hangs up at once; the library does not always hear the first.
    if isinstance(error, _HANGING_UP) or "disconnected" in text:
        return _hung_up(settings, who, greeted=greeted)
    return text, _START


def _hung_up(settings: Kafka, who: str, *, greeted: bool) -> tuple[str, str]:
    """Say why the broker closed the connection: by what it had been asked, and whether it had answered before."""
    if greeted and settings.sasl is not None:
        hint = "check kafka.sasl: username, mechanism and what is in password_file"
        return f"the login of {who} by {settings.sasl.mechanism} is refused", hint
    if greeted:
        return "this port asks for a login", "set kafka.sasl, or name another port in kafka.bootstrap"
    if settings.tls is None:
        return "the broker hangs up on plain text", "this is a TLS port, it seems: set kafka.tls"
    return "the broker hangs up", "see the broker's log"


def _protocol(settings: Kafka) -> str:
    if settings.sasl is None:
        return "PLAINTEXT" if settings.tls is None else "SSL"
    return "SASL_PLAINTEXT" if settings.tls is None else "SASL_SSL"


def _context(tls: Tls) -> ssl.SSLContext:
    """Make the context: TLS 1.2 or newer, the broker's certificate and name are always checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if tls.ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(tls.ca_file)
    except OSError as error:  # one of TLS's own is an OSError too
        raise ConfigError(f"kafka.tls.ca_file {tls.ca_file}: {_words(error)}", hint="a PEM file") from None
    if tls.certificate_file is None:
        return context
    try:
        # Without a password OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(tls.certificate_file, tls.key_file, password="")
    except OSError as error:
        raise ConfigError(
            f"kafka.tls.certificate_file {tls.certificate_file}, key_file {tls.key_file}: {_words(error)}",
            hint="a certificate in PEM and its key, without a password",
        ) from None
    return context


def _words(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _login(sasl: Sasl) -> dict[str, Any]:
    password = read_secret(sasl.password_file).get_secret_value()
    if not password:
        raise ConfigError(f"kafka.sasl.password_file {sasl.password_file} is empty", hint="write the password into it")
    return {
        "sasl_mechanism": sasl.mechanism,
        "sasl_plain_username": sasl.username,
        "sasl_plain_password": password,
    }


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a broker said to one question: the library's error, if any, and whether it had answered anything before."""

    error: KafkaError | None
    greeted: bool


def _ask(settings: Kafka, topic: str | None = None) -> _Answer:
    """Ask the first broker that can be reached for its metadata, and those of a topic."""
    selector = NetworkSelector()
    manager = KafkaConnectionManager(selector, request_timeout_ms=_PROBE_MS, **client_options(settings))
    manager.cluster.config["allow_auto_create_topics"] = False  # the manager does not hand this one on
    if topic is not None:
        manager.cluster.add_topic(topic)
    answer = _Answer(None, greeted=False)
    try:
        for broker in manager.cluster.bootstrap_brokers():
            connection = manager.get_connection(broker.node_id, timeout_ms=_PROBE_MS, refresh_metadata_on_err=False)
            try:
                manager.run(_metadata, manager, connection)
            except KafkaError as error:
                answer = _Answer(error, greeted=connection.broker_version_data is not None)
            else:
                hidden = topic in manager.cluster.unauthorized_topics
                return _Answer(TopicAuthorizationFailedError(f"topic {topic}") if hidden else None, greeted=True)
    finally:
        manager.close()
        selector.close()
    return answer


async def _metadata(manager: KafkaConnectionManager, connection: KafkaConnection) -> None:
    await manager.wait_for(connection.init_future, _PROBE_MS)
    await manager.cluster.refresh_metadata(connection.node_id)
