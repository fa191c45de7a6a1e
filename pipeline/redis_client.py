"""The way to Redis: address, user, password and TLS, and what a refusal of it means.

`open_client` reads the files of the secrets and connects at the first command, not before. Knows no thresholds. Called
by `threshold_store`.
"""

from __future__ import annotations

import re
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from pipeline.cameras import read_secret
from pipeline.errors import DependencyError
from pipeline.servers import Redis as RedisSettings

_TIMEOUT_S = 1.0

# What the client library and OpenSSL say, after the address's scheme: what it means, and what to do.
_MEANINGS: tuple[tuple[str, str, str], ...] = (
    (
        r"rediss.*CERTIFICATE_VERIFY_FAILED.*(Hostname|IP address) mismatch",
        "its certificate is for another name",
        "write the name of the certificate in redis.url, or have one made for this one",
    ),
    (
        r"rediss.*CERTIFICATE_VERIFY_FAILED.*expired",
        "its certificate has expired",
        "have it renewed; check this machine's clock too",
    ),
    (
        r"rediss.*CERTIFICATE_VERIFY_FAILED",
        "its certificate is not trusted",
        "name the authority that signed it in redis.ca_file",
    ),
    (
        r"rediss.*(ALERT|violation of protocol)",
        "it refuses this client's TLS",
        "it may ask for a client certificate that it trusts: redis.certificate_file and redis.key_file",
    ),
    (
        r"rediss.*(KEY_VALUES_MISMATCH|PEM lib|NO_CERTIFICATE|NO_START_LINE|No such file)",
        "the files of certificate, key or authority cannot be used",
        "they must be PEM, the key without a passphrase and that of the certificate: redis.ca_file, .certificate_file, "
        ".key_file",
    ),
    (
        r"rediss.*(handshake operation timed out|WRONG_VERSION_NUMBER|RECORD_LAYER)",
        "it does not answer in TLS",
        "write redis:// in redis.url if that port is one without TLS",
    ),
    (
        r"redis .*(reset by peer|Connection closed by server|Protocol Error|Broken pipe)",
        "it hangs up on plain text",
        "write rediss:// in redis.url if that port takes TLS only; else look whether it is running",
    ),
)


def open_client(settings: RedisSettings) -> redis.Redis:
    """Make a client; every command of it takes a second at most, or two where it has to connect anew.

    Raises ConfigError when the password's file cannot be read.
    """
    options: dict[str, Any] = {}
    if settings.password_file is not None:
        options["password"] = read_secret(settings.password_file).get_secret_value()
    if settings.user:
        options["username"] = settings.user
    if settings.url.startswith("rediss://"):
        files = {"ca_certs": settings.ca_file, "certfile": settings.certificate_file, "keyfile": settings.key_file}
        options |= {f"ssl_{name}": str(path) for name, path in files.items() if path is not None}
        # An empty passphrase: a key that wants one is refused, instead of a question on the terminal.
        options |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True, "ssl_password": ""}
    return redis.Redis.from_url(
        settings.url,
        decode_responses=True,
        encoding_errors="replace",
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        # Once more over a new connection, for one that lay idle may be dead; never for a server that hangs.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        client_name="logicrd",
        driver_info=None,  # the library's name and version would need one more right in Redis
        **options,
    )


def explained(settings: RedisSettings, error: redis.RedisError) -> DependencyError:
    """Say in the operator's words why Redis did not do what it was asked."""
    place, user = f"Redis at {settings.url}", settings.user or "default"
    if isinstance(error, NoPermissionError):
        return DependencyError(
            f"{place}: user {user!r} lacks a right: {error}",
            hint="README, 'Redis with users and TLS', lists the rights of the line and of an engineer",
        )
    if isinstance(error, AuthenticationError):
        asks = "already authenticated" in str(error) or "required" in str(error)
        refused = "it wants a password" if asks else f"user {user!r} or its password is refused"
        return DependencyError(f"{place}: {refused}", hint="correct redis.user and redis.password_file")
    said = f"{settings.url.partition(':')[0]} {error} {error.__context__}"
    for pattern, meaning, hint in _MEANINGS:
        if re.search(pattern, said, re.DOTALL):
            return DependencyError(f"{place}: {meaning}: {error}", hint=hint)
    return DependencyError(f"{place}: {error}", hint="start it, or correct redis.url in the line file")
