"""The commands on a repository in S3, on a real server (versitygw): what a folder promises holds there, whatever goes
wrong."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from exported import PRODUCT, graph, tiny, write_manifest
from integration.models_s3.places import Place
from s3_server import BUCKET, KEYS

from pipeline import cli, promotion, s3_bucket, s3_lock, s3_store
from pipeline.errors import CheckError, DependencyError
from pipeline.manifest import products_in, read_manifest
from pipeline.model_repository import ModelRepository
from pipeline.places import parse_place
from pipeline.promotion import promote
from pipeline.s3_bucket import Bucket

ROOT = Path(__file__).parents[3]
SECRET = KEYS["AWS_SECRET_ACCESS_KEY"]
WRONG = SECRET[::-1]


class Servers:
    """Replicas that do as they are told; real ones are below."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: {"one": 1.0} if name == "try_out" else []


def test_the_commands_work_on_a_bucket(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line file that names a bucket: push, list, a broken push that changes no object, prune; no key is ever told."""
    tiny(tmp_path / "served", 3)
    place.seed(tmp_path / "served")
    camera = {"id": "cam", "type": "folder", "path": ".", "product": PRODUCT, "station": "s"}
    line = {"line": "line", "cameras": [camera], "triton": {"address": "127.0.0.1:9", "models_repo": place.address}}
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(line))
    told = ""

    def models(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["logicrd", "models", *map(str, words), "-c", str(tmp_path / "line.yaml")])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        nonlocal told
        told += captured.out + captured.err
        return caught.value.code, captured.out, captured.err

    assert models("push", tiny(tmp_path / "new", 4))[:2] == (0, f"{PRODUCT} version 4 pushed\n")
    assert models("push", tmp_path / "new" / PRODUCT)[1] == f"{PRODUCT} version 4 was pushed before\n"
    assert models("push", tiny(tmp_path / "old", 2))[0] == 0
    before = place.objects()
    broken = tiny(tmp_path / "broken", 5)
    (broken.parent / f"{PRODUCT}.map/5/model.onnx").write_bytes(graph() + b"\0")
    code, _, err = models("push", broken)
    assert (code, "is not the manifest's" in err) == (5, True)
    assert place.objects() == before
    rows = json.loads(models("list", "--json")[1])
    assert [(row["version"], row["state"]) for row in rows] == [(2, "pushed"), (3, "served"), (4, "pushed")]
    left = place.root / f"{place.prefix}.versions/{PRODUCT}/9/model.onnx"
    left.parent.mkdir()
    left.write_bytes(b"of a push that was killed")
    assert json.loads(models("prune", PRODUCT, "--json")[1])["removed"] == [2]
    assert not [name for name in place.objects() if f"{PRODUCT}/2/" in name or f"{PRODUCT}/9/" in name]
    assert models("promote", PRODUCT, 4)[0] == 4  # Triton is not there
    assert SECRET not in told


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import s3_lock
from pipeline.model_repository import ModelRepository
from pipeline.places import parse_place
from pipeline.s3_bucket import Bucket
from pipeline.s3_lock import S3Lock
put, at = Bucket.put, int(sys.argv[3])
free = s3_lock.S3Lock._free
def hurried(self):
    s3_lock.LEASE_S = 1.0
    try:
        return free(self)
    finally:
        s3_lock.LEASE_S = 30.0
s3_lock.S3Lock._free = hurried
def counted(self, name, body, etag):
    global at
    at -= name != "lock"
    if at < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, name, body, etag)
Bucket.put = counted
repository = ModelRepository(parse_place(sys.argv[1]), parse_place(sys.argv[1] + ".versions"))
with repository.locked():
    repository.push(Path(sys.argv[2]))
    at = 0
    counted(repository._store._bucket, "end", b"", None)
"""


def test_a_killed_push_is_not_seen_and_can_be_repeated(place: Place, tmp_path: Path) -> None:
    """After kill -9 before any put but the last, no version is there; the next push completes it. After it, it is."""
    folder = tiny(tmp_path / "export", 4)
    files = len(json.loads((folder / "manifest.json").read_text())["files"])
    # Files that are there already are not put again: the second is killed before the manifest, the third after it.
    for kill_at, is_there in ((files // 2, False), (files - files // 2, False), (1, True)):
        command = [sys.executable, "-c", KILLED, place.address, str(folder), str(kill_at)]
        assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
        assert list(place.open().pushed(PRODUCT)) == [4] * is_there
        assert place.open().products() == [PRODUCT] * is_there
    assert place.push(folder) is False
    repository = place.open()
    with repository.locked():
        assert repository.checked(PRODUCT, 4).version == 4


def test_two_operators_never_make_one_version_of_two(place: Place, tmp_path: Path) -> None:
    """Of pushes at once under one number one is taken, whole; each other one is told why it is not."""
    folders = [tiny(tmp_path / name, 4) for name in ("one", "two", "three")]
    for number, folder in enumerate(folders):
        name, content = f"{PRODUCT}.mahalanobis/4/statistics.npz", bytes([number]) * 100
        (folder.parent / name).write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
        write_manifest(folder.parent, manifest)
    told: list[str] = []

    def push(repository: ModelRepository, folder: Path) -> None:
        try:
            with repository.locked():
                repository.push(folder)
        except CheckError as error:
            told.append(str(error))

    threads = [threading.Thread(target=push, args=[place.open(), folder]) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 2
    assert all("another command" in words or "another version 4" in words for words in told)
    repository = place.open()
    with repository.locked():
        assert repository.checked(PRODUCT, 4).version == 4


def test_a_command_that_was_cut_off_writes_no_more(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lock is renewed others are told who has it; one that is not is taken, and its holder then refuses."""
    tiny(tmp_path / "served", 3)
    place.seed(tmp_path / "served")
    first, second = place.open(), place.open()
    with first.locked(), pytest.raises(CheckError, match=r"another command is at work: .*@"), second.locked():
        raise AssertionError
    monkeypatch.setattr(first._store._lock, "_renew", lambda: None)
    monkeypatch.setattr(s3_lock, "LEASE_S", 3.0)
    with first.locked():
        assert first.write(PRODUCT, "rollout.json", b"{}") is None
        with second.locked(), pytest.raises(CheckError, match="could not be renewed"):
            first.write(PRODUCT, "rollout.json", b"[]")
    assert first.read(PRODUCT, "rollout.json") == b"{}"


@pytest.mark.parametrize("kill_at", [16, 26])
def test_a_killed_promotion_leaves_one_whole_version(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Workers read the version before until the manifest, which is put last, names the new one; again, it completes."""
    tiny(tmp_path / "served", 3)
    place.seed(tmp_path / "served")
    place.push(tiny(tmp_path / "export", 4))
    repository, put, left = place.open(), Bucket.put, [kill_at]

    class Killed(BaseException):
        pass

    def counted(self: Bucket, name: str, *rest: Any) -> str:
        left[0] -= name != "lock"
        if left[0] < 0 and name != "lock":
            raise Killed
        return put(self, name, *rest)

    monkeypatch.setattr(s3_bucket.Bucket, "put", counted)
    monkeypatch.setattr(promotion, "_undo", lambda *_: ([], []))
    monkeypatch.setattr(s3_store, "_TICK_S", 0.0)  # no Triton looks
    with pytest.raises(Killed), repository.locked():
        promote(repository, Servers(), PRODUCT, 4, by="anna", reason="")
    monkeypatch.setattr(s3_bucket.Bucket, "put", put)
    assert read_manifest(parse_place(place.address), PRODUCT).version == 3
    config = place.disk.config(PRODUCT)
    for step in config.ensemble_scheduling.step:
        version = 1 if step.model_name.startswith("teacher.") else step.model_version
        assert version in (1, 3, 4, -1)
        assert version == -1 or (place.root / place.prefix / step.model_name / str(version)).is_dir()
    with repository.locked():
        assert promote(repository, Servers(), PRODUCT, 4, by="anna", reason="").version == 4
    assert read_manifest(parse_place(place.address), PRODUCT).version == 4


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ({"AWS_SECRET_ACCESS_KEY": WRONG}, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access key", "AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials", "AWS_ACCESS_KEY_ID"),
        ({"AWS_CA_BUNDLE": ""}, "SSL", "AWS_CA_BUNDLE"),
        ({"bucket": "elsewhere"}, "NoSuchBucket", "make it"),
        ({"port": "9"}, "no answer", "port"),
        ({"scheme": "http"}, "no answer", "https"),
        ({"AWS_ENDPOINT_URL_S3": "nonsense", "address": "s3://models/line-1"}, "Invalid endpoint: nonsense", "port"),
        (
            {"AWS_ENDPOINT_URL_S3": f"http://line:{SECRET}@127.0.0.1:9", "address": "s3://models/line-1"},
            "http://127.0.0.1:9/models",
            "port",
        ),
    ],
)
def test_what_is_wrong_with_a_store_is_said_with_the_remedy(
    place: Place, monkeypatch: pytest.MonkeyPatch, fault: dict[str, str], words: str, hint: str
) -> None:
    """A wrong key, none, an unknown authority, no bucket, no server or none that could be one, plain text to TLS: the
    bucket and the remedy, and never a key."""
    monkeypatch.setattr(s3_bucket, "_ATTEMPTS", 1)
    for name in fault:
        if fault[name]:
            monkeypatch.setenv(name, fault[name])
        else:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    address = place.address.replace(f"/{BUCKET}/", f"/{fault.get('bucket', BUCKET)}/")
    address = address.replace(f":{place.server.port}/", f":{fault.get('port', place.server.port)}/")
    address = address.replace("https://", f"{fault.get('scheme', 'https')}://")
    address = fault.get("address", address)
    for call in (lambda: products_in(parse_place(address)), lambda: Bucket(parse_place(address)).put("x", b"", None)):
        with pytest.raises(DependencyError) as caught:
            call()
        assert address in str(caught.value)
        assert words in str(caught.value)
        assert hint in caught.value.hint
        assert SECRET not in str(caught.value)
        assert WRONG not in str(caught.value)


def test_what_arrives_damaged_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server compares the hash that comes with a file; nothing is there of one that differs."""
    monkeypatch.setattr(s3_bucket, "base64_sha256", lambda _, known=s3_bucket.base64_sha256: known(b"other"))
    with pytest.raises(CheckError, match="did not arrive as it was sent"):
        Bucket(parse_place(place.address)).put("file", b"content", None)
    assert place.objects() == {}


def test_what_somebody_else_wrote_is_not_overwritten(place: Place) -> None:
    """An object that came, changed or went since it was read is left as it is, whoever did it."""
    bucket = Bucket(parse_place(place.address))
    read = bucket.put("file", b"one", None)
    assert bucket.put("file", b"one", None) == read  # the answer to our own put was lost
    bucket.put("file", b"two", read)
    for etag in (None, read):
        with pytest.raises(CheckError, match="changed by another command"):
            bucket.put("file", b"three", etag)
    assert bucket.get("file").content == b"two"
    bucket.delete("file")
    with pytest.raises(CheckError, match="changed by another command"):
        bucket.put("file", b"three", read)
    bucket.delete("file")


@pytest.mark.parametrize("ignored", [("If-None-Match", "If-Match"), ("If-None-Match",), ("If-Match",)])
def test_a_store_without_conditions_or_hashes_is_worked_with(
    place: Place, tmp_path: Path, ignored: tuple[str, ...]
) -> None:
    """Where a server ignores conditions, or one kind of them, it is said; where it tells no hash, each file is read
    back."""
    repository = place.open()

    def forget(params: dict[str, Any], **_: object) -> None:
        for header in (*ignored, "x-amz-checksum-sha256"):
            params["headers"].pop(header, None)

    for store in (repository._models, repository._store):
        store._bucket._client.meta.events.register("before-call.s3.PutObject", forget)
    with structlog.testing.capture_logs() as said, repository.locked():
        assert repository.push(tiny(tmp_path / "export", 4))[1]
        assert repository.checked(PRODUCT, 4).version == 4
    assert ["no conditional writes" in each["event"] for each in said] == [True]


@pytest.mark.parametrize("kind", [None, "COMPOSITE"])
def test_a_hash_of_parts_is_not_taken_for_that_of_the_file(place: Place, kind: str | None) -> None:
    """An object that another tool put in parts is read and hashed, also where the server does not say what it tells."""
    bucket = Bucket(parse_place(place.address))
    bucket.put("weights", b"content", None)

    def of_parts(parsed: dict[str, Any], **_: object) -> None:
        parsed.pop("ChecksumType", None)
        parsed["ChecksumSHA256"] = s3_bucket.base64_sha256(b"other") + ("-2" if kind is None else "")
        parsed.update({} if kind is None else {"ChecksumType": kind})

    bucket._client.meta.events.register("after-call.s3.HeadObject", of_parts)
    assert bucket.digest("weights") == hashlib.sha256(b"content").hexdigest()
