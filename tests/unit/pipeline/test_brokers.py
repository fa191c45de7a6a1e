"""What every client of Kafka is told, as far as it goes without a broker; the rest is tested against a real one."""

import ssl

import pytest

from pipeline.brokers import client_options
from pipeline.errors import ConfigError
from pipeline.servers import Kafka


@pytest.fixture
def sasl(tmp_path):
    (tmp_path / "password").write_text("s3cret\n")
    return {"mechanism": "SCRAM-SHA-512", "username": "line", "password_file": tmp_path / "password"}


def test_without_more_a_client_speaks_plain_text():
    """Addresses, time limit, and no topic made by asking for it."""
    assert client_options(Kafka(bootstrap=["a:1", "b:2"], startup_timeout_s=3)) == {
        "bootstrap_servers": ["a:1", "b:2"],
        "bootstrap_timeout_ms": 3000,
        "security_protocol": "PLAINTEXT",
        "allow_auto_create_topics": False,
    }


@pytest.mark.parametrize(
    ("tls", "login", "protocol"),
    [({}, True, "SASL_SSL"), ({}, False, "SSL"), (None, True, "SASL_PLAINTEXT"), (None, False, "PLAINTEXT")],
)
def test_the_protocol_is_what_is_set(sasl, tls, login, protocol):
    """TLS and login are set apart; certificate and name are checked wherever there is TLS."""
    options = client_options(Kafka(tls=tls, sasl=sasl if login else None))
    assert options["security_protocol"] == protocol
    assert options.get("sasl_plain_password") == ("s3cret" if login else None)
    if tls is not None:
        context = options["ssl_context"]
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_password_is_in_no_words_of_the_settings(sasl):
    """Neither in their representation nor in their JSON; a password that is not there is named by its file."""
    settings = Kafka(sasl=sasl)
    assert "s3cret" not in repr(settings) + settings.model_dump_json()
    sasl["password_file"].unlink()
    with pytest.raises(ConfigError, match=r"secret file .*password cannot be read"):
        client_options(settings)
