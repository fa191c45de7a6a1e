"""Where a model repository is: folders and Triton's own form of a bucket's address; what may not stand in one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.places import S3Address, parse_place
from pipeline.s3_bucket import Bucket
from pipeline.s3_store import S3Store
from pipeline.servers import Triton

HIDDEN = "sesame"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("models_repo", Path("models_repo")),
        ("s3://models/line-1", S3Address("models", "line-1")),
        (
            "s3://https://minio.data:9000/models/line-1/now/",
            S3Address("models", "line-1/now", "https://minio.data:9000"),
        ),
        ("s3://http://127.0.0.1:7070/models", S3Address("models", "", "http://127.0.0.1:7070")),
    ],
)
def test_places_are_read_and_written_alike(text, place):
    """What is typed is what is told, and what Triton is started with."""
    assert parse_place(text) == place
    assert str(place) == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    [
        "s3://minio.data:9000/models/line-1",  # plain text to Triton, which nobody has asked for
        "s3://https://minio.data/models/line-1",  # Triton wants the port
        f"s3://https://anna:{HIDDEN}@minio.data:9000/models/line-1",
        f"s3://models/line-1?key={HIDDEN}",
        "s3://",
        "s3://models",  # where would the versions be?
        f" s3://https://anna:{HIDDEN}@minio.data:9000/models/line-1",
        f"https://anna:{HIDDEN}@minio.data:9000/models/line-1",
        f"S3://models/{HIDDEN}",
    ],
)
def test_addresses_that_could_mislead_are_refused_and_not_repeated(text):
    """Neither a server without a scheme or a port nor a secret is taken, and no secret is told."""
    with pytest.raises(ValidationError) as caught:
        Triton(models_repo=text)
    assert HIDDEN not in "".join(fault["msg"] for fault in caught.value.errors())


def test_versions_lie_beside_what_is_served():
    """In the same folder or bucket; two kinds of place have no lock that would hold for both."""
    assert Triton(models_repo="m").versions == Path("m.versions")
    assert str(Triton(models_repo="s3://models/line-1").versions) == "s3://models/line-1.versions"
    assert str(Triton(models_repo="s3://models", model_store="s3://versions/line-1").versions) == "s3://versions/line-1"
    with pytest.raises(ValidationError, match="two folders or two addresses"):
        Triton(models_repo="s3://models/line-1", model_store="versions")


@pytest.mark.parametrize(("place", "beside"), [(".", "line-1.versions"), ("..", "plant.versions")])
def test_versions_lie_beside_the_folder_that_one_is_in(tmp_path, monkeypatch, place, beside):
    """A folder that is called by no name of its own has one all the same; a whole file system has none."""
    here = tmp_path / "plant/line-1"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert Triton(models_repo=place).versions.name == beside
    with pytest.raises(ValidationError, match="whole file system"):
        Triton(models_repo="/")


@pytest.mark.parametrize(
    ("models", "store"),
    [("m", "m"), ("m", "m/versions"), ("/srv/m", "/srv/x/../m/v"), ("m/now", "m"), ("s3://mine/a", "s3://mine/a/v")],
)
def test_versions_do_not_lie_in_what_is_served(models, store):
    """Each would take the other's folders for its own, and `prune` remove what is served."""
    with pytest.raises(ValidationError, match="lie in one another"):
        Triton(models_repo=models, model_store=store)
    assert Triton(models_repo="s3://mine/a", model_store="s3://mine/ab").versions == S3Address("mine", "ab")


def test_without_the_sdk_the_remedy_is_said(monkeypatch):
    """The extra is optional: who names a bucket without it is told what to install."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match="SDK of S3 is not installed") as caught:
        Bucket(S3Address("models", "line-1")).list("")
    assert caught.value.hint == "pip install 'logicrd[s3]'"


def test_names_of_a_bucket_never_leave_a_folder(tmp_path, monkeypatch):
    """An object that somebody called `../x` is not copied to this machine."""
    store = S3Store(S3Address("models", "line-1"))
    monkeypatch.setattr(Bucket, "list", lambda *_: {"tray/4/../../../x": "etag"})
    with pytest.raises(Exception, match="leads out of its folder"):
        store.fetch("tray/4", tmp_path)
