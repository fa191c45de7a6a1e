"""The graphs of a running line: whose camera goes into which, and what a graph is started from."""

from pathlib import Path

import pytest
import yaml

from pipeline import config, deepstream
from pipeline.deepstream import Graphs, ScoredSource
from pipeline.errors import DependencyError, SourceError
from pipeline.manifest import Manifests, read_manifest
from pipeline.sources.files import FolderSource

CAMERA = {"type": "rtsp", "product": "tray", "url": "rtsp://127.0.0.1:9/x", "decoder": "deepstream"}


@pytest.fixture
def settings(line_file, models_repo):
    """A line of three cameras that are scored by graphs, of two products, and a folder of a third one."""
    graph = CAMERA | {"inference": "graph"}
    cameras = [graph | {"id": "c1"}, graph | {"id": "c2"}, graph | {"id": "c3", "product": "cable-set"}]
    folder = {"id": "c4", "type": "folder", "product": "cup", "path": "pictures"}
    triton = {"models_repo": str(models_repo), "address": "triton:8001"}
    return config.load(line_file(cameras=[*cameras, folder], triton=triton))


@pytest.fixture
def manifests(settings):
    return Manifests({name: read_manifest(settings.triton.models_repo, name) for name in settings.graph_products})


@pytest.fixture
def graphs(settings, manifests):
    made = Graphs(settings, manifests)
    yield made
    made.close()


def host_of(source):
    return source._host


def started_from(source):
    return Path(host_of(source)._start_order()["config"])


def test_cameras_of_a_product_share_a_graph_and_others_are_opened_as_ever(graphs, settings):
    """A graph a product; a camera without one has the source of its kind."""
    one, two, other, folder = (graphs.open(camera) for camera in settings.cameras)
    assert isinstance(one, ScoredSource)
    assert host_of(one) is host_of(two) is not host_of(other)
    assert isinstance(folder, FolderSource)
    assert started_from(one) != started_from(other)


def test_a_graph_is_started_from_the_files_that_render_writes(graphs, settings):
    """Its own folder holds them, with room for the product's cameras; they go when the line ends."""
    at = started_from(graphs.open(settings.cameras[0]))
    assert {path.name for path in at.parent.iterdir()} == {"pipeline.yaml", "nvinferserver.pbtxt", "mux.txt"}
    nodes = {node["name"]: node["properties"] for node in yaml.safe_load(at.read_text())["deepstream"]["nodes"]}
    assert list(nodes) == ["cameras", "arrivals", "infer", "end"]
    assert nodes["cameras"]["max-batch-size"] == 2
    assert Path(nodes["infer"]["config-file-path"]).is_file()
    assert 'url: "triton:8001"' in (at.parent / "nvinferserver.pbtxt").read_text()
    assert started_from(graphs.open(settings.cameras[0])) == at  # when its process starts again
    graphs.close()
    assert not at.parent.exists()


def test_another_version_has_a_graph_of_its_own(graphs, settings, manifests, make_manifest):
    """Cameras that are opened after a promotion go into a graph that asks for the version in force."""
    before = graphs.open(settings.cameras[0])
    manifests["tray"] = make_manifest(version=2, model_sha256="cd" * 32)
    after = graphs.open(settings.cameras[0])
    assert host_of(after) is not host_of(before)
    assert "version: 2" in (started_from(after).parent / "nvinferserver.pbtxt").read_text()
    with pytest.raises(SourceError, match="version 2 is in force"):
        before.read()


def test_a_folder_that_cannot_be_written_is_a_loss_that_is_tried_again(graphs, settings, monkeypatch):
    """A full disk costs the camera a state, with a reason; the reader tries again."""
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(SourceError) as caught:
        graphs.open(settings.cameras[0])
    assert (caught.value.reason, caught.value.final) == ("capture_died", False)


@pytest.mark.parametrize(("program", "why"), [("exec sleep 5", "timed out"), ("exit 7", "exit code 7")])
def test_a_probe_that_hangs_or_dies_is_no_deepstream(settings, tmp_path, monkeypatch, program, why):
    """A library that hangs, or ends the process without a word, is told as one that is missing."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(deepstream, "PYTHON", python)
    monkeypatch.setattr(deepstream, "_PROBE_TIMEOUT_S", 0.5)
    with pytest.raises(DependencyError, match=why):
        deepstream.tried(settings.cameras)
