"""The Triton client, as far as it goes without a server: signatures, shapes, deadlines, and a refused connection."""

import queue
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from triton_answers import answer, batch_of, metadata

from pipeline.balance import Fault
from pipeline.errors import DependencyError
from pipeline.tensors import signature_faults
from pipeline.types import Batch, Cause


def test_the_signature_of_the_design_fits(make_manifest):
    """The ensemble of the manifest has no fault, and a tensor more among its outputs is none."""
    assert signature_faults(metadata(), make_manifest()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": None}, ["output score is absent"]),
        ({"image": ("FP32", [-1, 256, 256, 3])}, ["input image is FP32 [256, 256, 3], not UINT8 [256, 256, 3]"]),
        ({"image": ("UINT8", [-1, 224, 224, 3])}, ["input image is UINT8 [224, 224, 3]"]),
        ({"image": ("UINT8", [-1, 3, 256, 256])}, ["input image is UINT8 [3, 256, 256]"]),
        ({"anomaly_map": ("FP32", [-1, 32, 32])}, ["output anomaly_map is FP32 [32, 32], not FP32 [64, 64]"]),
        ({"mask": ("UINT8", [-1, 1])}, ["input mask is asked for"]),
        ({"score": ("FP16", [-1, 1]), "map_score": None}, ["output score is FP16", "output map_score is absent"]),
    ],
)
def test_a_difference_is_a_sentence(make_manifest, changes, words):
    """Each tensor that is absent, of another type, of another shape or too many is named with both sides."""
    faults = signature_faults(metadata(**changes), make_manifest())
    assert len(faults) == len(words)
    assert all(any(word in fault for fault in faults) for word in words)


def test_another_version_than_the_manifests_is_a_fault(make_manifest):
    """Triton serving an older version than the manifest describes is named with both numbers."""
    (fault,) = signature_faults(metadata(), make_manifest(version=2))
    assert fault == "version 1 is loaded, not 2"


@pytest.mark.parametrize("document", [{}, {"inputs": [], "outputs": []}])
def test_a_model_without_tensors_is_all_faults(make_manifest, document):
    """A model that shows nothing lacks everything."""
    assert len(signature_faults(document, make_manifest())) == 5


def test_the_budget_goes_with_the_request(client, make_frame, monkeypatch):
    """What is left of the youngest frame's budget is the call's deadline."""
    calls = []
    server = SimpleNamespace(async_infer=lambda *_, **keywords: calls.append(keywords))
    monkeypatch.setattr(client._pool, "take", lambda *_: (SimpleNamespace(address="a"), server))
    now_s = time.monotonic()
    frames = batch_of(make_frame, 2, captured_s=now_s, image=np.zeros((8, 8, 3), np.uint8)).frames
    batch = Batch("tray", (frames[0], replace(frames[1], deadline_s=now_s + 30)))
    client.submit(batch, lambda _: None)
    (call,) = calls
    assert 0 < call["client_timeout"] <= 30


def test_each_frame_gets_its_own_row(client, make_frame):
    """Row i of every tensor belongs to frame i, and the answer names the model."""
    batch = batch_of(make_frame, 3)
    inferences, fault, _ = client._read(batch, client._versions["tray"], answer(3), None, sent_s=1.0)
    assert fault is None
    assert [inference.frame for inference in inferences] == list(batch.frames)
    third = inferences[2].scores
    assert (third.fused, third.map, third.mahalanobis) == (2.0, 12.0, 22.0)
    assert inferences[2].anomaly_map.shape == (64, 64)
    assert (inferences[0].model.name, inferences[0].model.version) == ("tray", "1")


@pytest.mark.parametrize(
    "changes",
    [
        {"score": None},
        {"score": np.zeros((2, 1), np.float32)},
        {"score": np.zeros(3, np.float32)},
        {"mahalanobis": np.zeros((3, 2), np.float32)},
        {"anomaly_map": np.zeros((3, 32, 32), np.float32)},
        {"anomaly_map": np.zeros((3, 1, 64, 64), np.float32)},
        {"version": "2"},
    ],
)
def test_an_answer_of_another_model_is_a_mismatch(client, make_frame, changes):
    """Tensors that are missing or of another shape, and another version, give every frame `model_mismatch` and no
    score; the replica is under suspicion."""
    inferences, fault, words = client._read(
        batch_of(make_frame, 3), client._versions["tray"], answer(3, **changes), None, sent_s=1.0
    )
    assert fault is Fault.SICK
    assert words
    assert [(inference.cause, inference.scores) for inference in inferences] == [(Cause.MODEL_MISMATCH, None)] * 3


def test_a_score_that_is_not_finite_is_passed_on(client, make_frame):
    """The client judges nothing: NaN from Triton arrives as NaN, for the verdict to refuse."""
    nan = np.full((1, 1), np.nan, np.float32)
    (inference,), _, _ = client._read(
        batch_of(make_frame, 1), client._versions["tray"], answer(1, score=nan), None, 1.0
    )
    assert inference.cause is None
    assert np.isnan(inference.scores.fused)


def test_a_server_that_is_not_there_is_named(client):
    """A server that does not answer stops the start with its address and what to do."""
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9") as caught:
        client.start()
    assert "triton.address" in caught.value.hint


def test_a_batch_past_its_deadline_is_not_sent(client, make_frame):
    """Frames without time left come back as `deadline` at once, before any connection is needed."""
    done = []
    client.submit(batch_of(make_frame, 2, captured_s=time.monotonic() - 60.0), done.extend)
    assert [inference.cause for inference in done] == [Cause.DEADLINE] * 2


def test_a_lost_server_costs_the_batch_and_nothing_else(client, make_frame):
    """With the server away, and after `close`, every frame of a batch comes back as `triton_unavailable`, once."""
    with pytest.raises(DependencyError):
        client.start()
    answers = queue.Queue()
    client.submit(batch_of(make_frame, 2), answers.put)
    assert [inference.cause for inference in answers.get(timeout=5.0)] == [Cause.TRITON_UNAVAILABLE] * 2
    client.close()
    client.submit(batch_of(make_frame, 2), answers.put)
    assert [inference.cause for inference in answers.get(timeout=5.0)] == [Cause.TRITON_UNAVAILABLE] * 2
    assert answers.empty()
