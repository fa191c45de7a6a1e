"""Those who read a repository in S3, on a real server (versitygw): workers and the embedded Triton."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
from exported import PRODUCT, heavier, shipped, tiny
from integration.models_s3.places import Place
from processes import free_ports
from s3_server import S3Server
from signers import make_keys
from triton_server import Triton as TritonServer
from triton_server import TritonPorts

from pipeline import s3_bucket
from pipeline.errors import ConfigError
from pipeline.manifest import Manifests, products_in, read_manifest
from pipeline.metrics import Metrics
from pipeline.model_control import ModelControl
from pipeline.newcomers import Newcomers
from pipeline.places import parse_place
from pipeline.promotion import promote, rollback
from pipeline.s3_bucket import Bucket
from pipeline.servers import Triton
from pipeline.signatures import sign

ROOT = Path(__file__).parents[3]


def test_a_worker_judges_with_what_was_signed_alone(place: Place, tmp_path: Path) -> None:
    """Signature and weights' hashes are asked of the bucket as of a folder: a stranger's file is named."""
    key, signer = make_keys(tmp_path, "mine")
    folder, address = tiny(tmp_path / "served", 3), parse_place(place.address)
    place.seed(folder.parent)
    with pytest.raises(ConfigError, match="not signed"):
        read_manifest(address, PRODUCT, signer)
    bucket = Bucket(address)
    bucket.put(f"{PRODUCT}/manifest.json.sig", sign(folder / "manifest.json", key).read_bytes(), None)
    assert read_manifest(address, PRODUCT, signer).version == 3
    name = f"{PRODUCT}.map/3/model.onnx"
    bucket.put(name, b"a stranger's", bucket.get(name).etag)
    with pytest.raises(ConfigError, match=f"not its files: {name}"):
        read_manifest(address, PRODUCT, signer)


def test_more_objects_than_one_answer_holds_are_listed(place: Place) -> None:
    """A thousand are one page: the one after is there too."""
    for number in range(1001):
        folder = place.root / place.prefix / f"product-{number}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(b"{}")
    assert len(products_in(parse_place(place.address))) == 1001


def test_a_worker_goes_on_while_the_store_is_away(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nothing is refused or withdrawn, which is said once; when it is back, what is new there is taken."""
    monkeypatch.setattr(s3_bucket, "_ATTEMPTS", 1)
    tiny(tmp_path / "served", 3)
    place.seed(tmp_path / "served")
    address = parse_place(place.address)
    manifests = Manifests({PRODUCT: read_manifest(address, PRODUCT)})
    others = SimpleNamespace(
        check=lambda _: "", learn=lambda _: True, take=lambda _: None, keep=lambda *_: None, withdraw=pytest.fail
    )
    about = {"new_products": False, "graph_products": (), "metrics": Metrics()}
    newcomers = Newcomers(Triton(models_repo=address), manifests, others, others, **about)
    place.server.stop()
    try:
        with structlog.testing.capture_logs() as said:
            newcomers.look()
            newcomers.look()
    finally:
        place.server.start()
    assert [each["event"] for each in said] == ["model repository not read; the versions in force go on"]
    assert (manifests[PRODUCT].version, newcomers.fault(PRODUCT)) == (3, "")
    changed = json.loads((tmp_path / "served" / PRODUCT / "manifest.json").read_text()) | {"model_sha256": "ab" * 32}
    place.open().write(PRODUCT, "manifest.json", json.dumps(changed | {"version": 4}).encode())
    newcomers.look()
    assert manifests[PRODUCT].version == 4


@contextmanager
def running(triton: TritonServer, models: str, folder: Path, authority: Path | None) -> Iterator[None]:
    """Start the embedded Triton on a bucket, until all of its models answer; `authority` vouches for a server with TLS,
    from where the chart mounts it."""
    triton.prepare()
    shell = 'mount --bind "$0" /etc/ssl/certs/ca-certificates.crt && exec env "$@"'
    mounting = ["env"] if authority is None else ["unshare", "--mount", "sh", "-ec", shell, str(authority)]
    command = [f"--model-repository={models}" if each.startswith("--model-rep") else each for each in triton.command()]
    with (folder / "log").open("wb") as log:
        settings = [f"{name}={value}" for name, value in triton.environment().items()]
        process = subprocess.Popen([*mounting, *settings, *command], stdout=log, stderr=log, cwd=folder)
    try:
        until = time.monotonic() + 120
        while triton.check() != "":
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)
        triton.clean()


@pytest.mark.stack
def test_triton_serves_a_bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Triton reads the repository from the same address: promotion and rollback are proved on its own answers,
    and leave the manifest that workers read. By TLS, or by plain http where this user may mount no authority."""
    secure = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    if not secure:
        server = S3Server(tmp_path / "s3")
        server.start()
        monkeypatch.delenv("AWS_CA_BUNDLE")
    place = Place(server, "line-1")
    (tmp_path / "key").write_text("sesame")
    ports = TritonPorts(*free_ports(3))
    triton = TritonServer(tmp_path / "state", Path(), (ROOT / ".venv-triton").resolve(), ports, "sesame")
    settings = Triton(address=f"127.0.0.1:{ports.grpc}", models_repo=place.address, control_key_file=tmp_path / "key")
    now = shipped()["version"]
    try:
        place.seed(heavier(tmp_path / "served", now).parent)
        with running(triton, place.address, tmp_path, server.folder / "ca.pem" if secure else None):
            place.push(heavier(tmp_path / "next", now + 1))
            repository = place.open()
            with repository.locked(), ModelControl(settings) as control:
                assert promote(repository, control, PRODUCT, now + 1, by="anna", reason="").version == now + 1
                assert read_manifest(settings.models_repo, PRODUCT).version == now + 1
                assert rollback(repository, control, PRODUCT, by="anna", reason="").version == now
            assert read_manifest(settings.models_repo, PRODUCT).version == now
    finally:
        if not secure:
            server.stop()
