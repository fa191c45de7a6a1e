"""What the integration tests share besides the stack: a Kafka that asks who is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from secure_broker import SecureBroker, secure_broker


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """A real broker with TLS, logins and ACLs; one for all tests."""
    with secure_broker(tmp_path_factory.mktemp("secure")) as broker:
        yield broker
