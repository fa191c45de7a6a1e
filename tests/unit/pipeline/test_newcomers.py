"""Products that come while the line runs: when they are the line's, and what is said of those that are not."""

import json
from types import SimpleNamespace

import pytest
import structlog

from pipeline.manifest import read_manifest
from pipeline.newcomers import Newcomers


class Servers:
    """Triton and Redis, as far as a new product asks them."""

    def __init__(self):
        self.fault = ""
        self.is_known = True
        self.asked = []

    def learn_model(self, manifest):
        self.asked.append(manifest.product)
        return self.fault


@pytest.fixture
def servers():
    return Servers()


@pytest.fixture
def line(models_repo, servers):
    """A line that knows `tray` of a repository with `cable-set` besides; gives its manifests and its look-out."""
    manifests = {"tray": read_manifest(models_repo, "tray")}
    inference = SimpleNamespace(learn=servers.learn_model)
    thresholds = SimpleNamespace(learn=lambda _: servers.is_known)
    return manifests, Newcomers(models_repo, manifests, inference, thresholds)


def test_a_product_is_the_lines_once_it_is_served_and_its_limits_are_known(line, servers):
    """Neither before the model nor before the threshold is there; a known product is never asked for."""
    manifests, newcomers = line
    servers.fault = "Triton at x: does not serve it"
    newcomers.look()
    servers.fault, servers.is_known = "", False
    newcomers.look()
    assert list(manifests) == ["tray"]
    servers.is_known = True
    newcomers.look()
    assert list(manifests) == ["tray", "cable-set"]
    newcomers.look()
    assert servers.asked == ["cable-set"] * 3


def test_what_is_wrong_with_a_product_is_said_once(line, servers, models_repo):
    """The same fault is one line of the log; another fault, and that of a product that came anew, are others."""
    manifests, newcomers = line
    path = models_repo / "cable-set" / "manifest.json"
    good = path.read_bytes()
    with structlog.testing.capture_logs() as said:
        servers.fault = "not served"
        newcomers.look()
        newcomers.look()
        path.write_text("{")
        newcomers.look()
        path.unlink()
        newcomers.look()
        path.write_bytes(good)
        newcomers.look()
    assert [line["error"].partition(":")[0] for line in said] == ["not served", f"manifest {path}", "not served"]
    assert {line["product"] for line in said} == {"cable-set"}
    assert json.loads(good)["product"] not in manifests
