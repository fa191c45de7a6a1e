"""The manifest beside a model: what of it the line believes."""

import hashlib
import json
import subprocess
from types import SimpleNamespace

import pytest
from signers import make_keys

from pipeline.errors import ConfigError
from pipeline.manifest import read_manifest
from pipeline.signatures import sign
from pipeline.types import ThresholdSource


def test_a_manifest_gives_the_threshold_that_holds_until_somebody_sets_one(models_repo):
    """The suggestion is version 0, from the manifest, for this model."""
    manifest = read_manifest(models_repo, "tray")
    suggestion = manifest.suggestion
    assert (suggestion.ng, suggestion.review, suggestion.version) == (3.0, 2.0, 0)
    assert suggestion.source is ThresholdSource.MANIFEST
    assert suggestion.model_sha256 == manifest.model_sha256


def test_a_wrong_product_names_the_known_ones(models_repo):
    """A product that the repository lacks is refused with those it has."""
    with pytest.raises(ConfigError, match=r"'trya'.*has: cable-set, tray"):
        read_manifest(models_repo, "trya")


def test_a_missing_repository_is_named(tmp_path):
    """A model repository that does not exist is refused by its path."""
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        read_manifest(tmp_path / "nowhere", "tray")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("\xff", ""),
        ("[]", ""),
        ("{}", "schema_version"),
    ],
)
def test_a_broken_manifest_is_named(models_repo, text, place):
    """A manifest that is not one is refused with its path and the first thing wrong in it."""
    path = models_repo / "tray" / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"{path}.*{place}"):
        read_manifest(models_repo, "tray")


def _set(document, place, value):
    *steps, last = place.split(".")
    for step in steps:
        document = document[step]
    document[last] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("schema_version", 2),
        ("preprocessing", "resize-cubic-v1"),
        ("input.colour", "BGR"),
        ("input.height", 0),
        ("input.width", 1_000_000),
        ("model_sha256", "abc"),
        ("calibration.thresholds.ng", float("nan")),
        ("calibration.thresholds.review", float("inf")),
        ("calibration.fusion.map_std", 0.0),
        ("calibration.heatmap.limit", float("nan")),
        ("calibration.thresholds", {"ng": 1.0, "review": 2.0}),
    ],
)
def test_a_manifest_with_a_senseless_value_is_refused(models_repo, manifest_document, place, value):
    """A value that would let everything through, or divide by nothing, is refused with its place."""
    document = manifest_document()
    _set(document, place, value)
    (models_repo / "tray" / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=place.replace(".", r"\.")):
        read_manifest(models_repo, "tray")


def test_a_manifest_in_the_wrong_folder_is_refused(models_repo, manifest_document):
    """A manifest of another product than its folder's is refused with both names."""
    (models_repo / "tray" / "manifest.json").write_text(json.dumps(manifest_document("cable-set")))
    with pytest.raises(ConfigError, match="'cable-set', not 'tray'"):
        read_manifest(models_repo, "tray")


def test_a_newer_exporter_may_say_more(models_repo, manifest_document):
    """Keys that the line does not know are no fault."""
    (models_repo / "tray" / "manifest.json").write_text(json.dumps(manifest_document(novelty={"a": 1})))
    assert read_manifest(models_repo, "tray").product == "tray"


@pytest.fixture
def signed(models_repo, manifest_document, tmp_path):
    """A manifest of one weight file, signed by `mine`, whose public half is the second of two in `signer`."""
    weights = models_repo / "tray.map/1/model.onnx"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"graph")
    files = {"tray.map/1/model.onnx": hashlib.sha256(b"graph").hexdigest(), "tray.map/config.pbtxt": "0" * 64}
    manifest = models_repo / "tray/manifest.json"
    manifest.write_text(json.dumps(manifest_document(files=files)))
    (mine, public), (other, others) = (make_keys(tmp_path, name) for name in ("mine", "other"))
    signer = tmp_path / "signer.pem"
    signer.write_text("the one of before:\n" + make_keys(tmp_path, "old")[1].read_text() + public.read_text())
    sign(manifest, mine)
    return SimpleNamespace(manifest=manifest, weights=weights, other=other, others=others, signer=signer)


def test_a_signed_manifest_is_read_by_any_key_of_the_file(models_repo, signed):
    """A key may be renewed: old and new stand in one file. Configurations may be tuned, and weights that a worker does
    not have are not asked for."""
    assert read_manifest(models_repo, "tray", signed.signer).product == "tray"
    (signed.weights.parents[1] / "config.pbtxt").write_text("tuned")
    signed.weights.unlink()
    assert read_manifest(models_repo, "tray", signed.signer).product == "tray"


@pytest.mark.parametrize("what", ["unsigned", "other key", "changed", "weights", "RSA", "no key", "no file"])
def test_what_the_signer_did_not_sign_is_not_read(models_repo, signed, what):
    """No signature, another's, a manifest or weights changed after it, and a file with no such key: each is named."""
    signature = signed.manifest.with_name("manifest.json.sig")
    words, signer = "not signed by a key of", signed.signer
    if what == "unsigned":
        signature.unlink()
        words = "not signed, and `triton.signer_file` asks"
    elif what == "other key":
        sign(signed.manifest, signed.other)
    elif what == "changed":
        signed.manifest.write_bytes(signed.manifest.read_bytes() + b" ")
    elif what == "weights":
        signed.weights.write_bytes(b"another graph")
        words = r"not its files: tray\.map/1/model\.onnx"
    elif what == "RSA":
        signer = signed.manifest.with_name("rsa.pem")
        private = subprocess.run(["openssl", "genpkey", "-algorithm", "rsa"], check=True, capture_output=True).stdout
        subprocess.run(["openssl", "pkey", "-pubout", "-out", str(signer)], input=private, check=True)
        words = "a key that is none of Ed25519"
    elif what == "no key":
        signer = signed.other
        words = "no public key in PEM"
    else:
        signer = models_repo / "nowhere"
        words = "nowhere: No such file"
    with pytest.raises(ConfigError, match=words):
        read_manifest(models_repo, "tray", signer)
    assert read_manifest(models_repo, "tray").product == "tray"
