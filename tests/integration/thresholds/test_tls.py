"""Thresholds over TLS and with passwords, and each refusal in words."""

from __future__ import annotations

import pytest
from integration.thresholds.watched import USERS, asked, change, tls
from redis_server import RedisServer

from pipeline.errors import DependencyError


def test_thresholds_travel_over_tls(server, certificates, store_of, manifest):
    """With password, user and TLS a change is written and read."""
    values = {key: value for key, value in tls(server, certificates).items() if key != "user"}
    store_of("anna", **values).write([change(manifest, 7.5)], author="Anna")
    assert asked(tls(server, certificates))["ng"] == "7.5"


@pytest.mark.parametrize(
    ("spoilt", "told", "hint"),
    [
        ({"password_file": "wrong"}, "user 'anna' or its password is refused", "password_file"),
        ({"user": "", "password_file": None}, "it wants a password", "password_file"),
        ({"ca_file": "other"}, "its certificate is not trusted", "redis.ca_file"),
        ({"ca_file": None}, "its certificate is not trusted", "redis.ca_file"),
        ({"url": "redis"}, "it hangs up on plain text", "rediss://"),
        ({"url": "rediss"}, "it does not answer in TLS", "redis://"),
    ],
    ids=["password", "no-password", "other-authority", "system-authority", "plain-to-tls", "tls-to-plain"],
)
def test_a_refusal_is_told_in_words(server, certificates, tmp_path, spoilt, told, hint):
    """Each way to be turned away has its own message and remedy, and no message holds the password."""
    (tmp_path / "wrong").write_text("not-the-password")
    places = {
        "wrong": str(tmp_path / "wrong"),
        "other": str(certificates.other_crt),
        "redis": f"redis://127.0.0.1:{server.tls_port}/0",
        "rediss": f"rediss://127.0.0.1:{server.port}/0",
    }
    values = tls(server, certificates) | {key: places.get(value, value) for key, value in spoilt.items()}
    if spoilt.get("url") == "redis":
        del values["ca_file"]
    with pytest.raises(DependencyError, match=told) as caught:
        asked(values)
    assert hint in caught.value.hint
    assert "not-the-password" not in f"{caught.value} {caught.value.hint}"
    assert "password-of-anna" not in f"{caught.value} {caught.value.hint}"


def test_a_certificate_for_another_name_is_refused(server, certificates):
    """The server's name has to stand in its certificate."""
    values = tls(server, certificates, url=f"rediss://localhost:{server.tls_port}/0")
    with pytest.raises(DependencyError, match="its certificate is for another name"):
        asked(values)


def test_a_server_may_ask_for_a_client_certificate(tmp_path, certificates):
    """Without one, with a foreign one or with a wrong key the refusal says what is missing; with its own it works."""
    lines = ("tls-auth-clients yes",)
    with RedisServer(tmp_path / "redis", lines, certificates=certificates, users=USERS) as server:
        own = {"certificate_file": str(certificates.client_crt), "key_file": str(certificates.client_key)}
        other = {"certificate_file": str(certificates.other_crt), "key_file": str(certificates.other_key)}
        assert asked(tls(server, certificates, **own)) == {}
        for pair in ({}, other):
            with pytest.raises(DependencyError, match="it refuses this client's TLS") as caught:
                asked(tls(server, certificates, **pair))
            assert "redis.certificate_file" in caught.value.hint
        with pytest.raises(DependencyError, match="files of certificate, key or authority cannot be used"):
            asked(tls(server, certificates, **own | {"key_file": str(certificates.other_key)}))
