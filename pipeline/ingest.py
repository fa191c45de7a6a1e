"""One supervised reader a camera: opens it, stamps each frame, brings it to model size, hands it over.

A camera that is lost is opened again with growing pauses, one log line a change of state; a picture that cannot be used
becomes a frame with a cause, so that its part gets a verdict. A graph that keeps its pictures gives frames without
them, and what it says of each later on. Never decides, never queues. Started by `app`.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import cv2
import numpy as np
import structlog

from pipeline.cameras import Camera, LiveCamera
from pipeline.errors import FrameError, SourceError
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.networks import Networks
from pipeline.region import cut_region
from pipeline.sources import Source, open_source
from pipeline.types import IDLE, CameraState, Cause, Frame, Idle, Image, Inference, Picture, Scored, Seen

FIRST_PAUSE_S = 0.5
_MOST_ASKED = 1000
"""Frames of a camera of which a graph has said nothing yet; of the oldest beyond it an answer counts for nothing."""

log = structlog.get_logger(__name__)


def to_model_size(image: Image, height: int, width: int) -> Image:
    """Resize HWC uint8 RGB to the model's size: preprocessing `resize-area-v1`, as in training/data.py."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Handover:
    """What a reader needs of the line: where frames go, when there is room, and whom to tell.

    `announce(camera_id, state, reason)` is called once a change of state; `run` names this run in generated part ids,
    and no camera is opened outside of `networks`, where there are any. `answer` gets what a graph says of frames that
    were accepted without their picture.
    """

    accept: Callable[[Frame], None]
    answer: Callable[[Inference], None]
    wait_for_room: Callable[[str, float], bool]
    announce: Callable[[str, CameraState, str], None]
    metrics: Metrics
    health: Health
    run: str
    budget_s: float
    networks: Networks = ()
    open: Callable[[Camera, Networks], Source] = open_source


class CameraReader:
    """The thread of one camera."""

    def __init__(self, camera: Camera, model_size: tuple[int, int], line: Handover, *, number: int = 0) -> None:
        self._camera = camera
        self._model_size = model_size
        self._view = None if camera.region is None else camera.region.view
        self._inside = None if camera.region is None else camera.region.inside()
        self._line = line
        self._stop = threading.Event()
        self._number = number  # of the last frame; above 0 for a camera that this line has read before
        self._round = 0
        self._state = CameraState.CONNECTING
        self._reason = ""
        self._last_count: int | None = None
        self._is_keyless = False
        self._frame_fault = ""
        # Frames whose picture a graph keeps and of which it has said nothing yet, by its number, the oldest first.
        self._asked: dict[int, Frame] = {}
        # The last picture's digest, and since when it has been the same.
        self._still: tuple[int, float] | None = None
        self._stage = f"camera {camera.id}"
        self._thread = threading.Thread(target=self._run, name=self._stage, daemon=True)

    @property
    def finished(self) -> bool:
        """Whether this camera will give no more frames."""
        return self._state in {CameraState.ENDED, CameraState.FAILED}

    @property
    def number(self) -> int:
        """Number of the last frame."""
        return self._number

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the reader to end; it does after the read under way."""
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the reader's end; False when it is still in a read."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception:  # the thread's top frame: a fault of ours ends this camera, says so, and no other
            log.exception("camera reader failed", camera=self._camera.id)
            self._change(CameraState.FAILED, "internal")
        finally:
            self._line.health.retire(self._stage)

    def _supervise(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set():
            error = self._read_once()
            if error is None and not isinstance(self._camera, LiveCamera):
                if not self._camera.loop:
                    self._change(CameraState.ENDED)
                    return
                self._round += 1
                continue
            if error is not None and error.final:
                self._change(CameraState.FAILED, error.reason, str(error), error.hint)
                return
            if self._stop.is_set():
                return
            reason, text, hint = (error.reason, str(error), error.hint) if error else ("stream_ended", "", "")
            if (self._reason, reason) == ("stream_ended", "no_frames"):
                reason = self._reason  # there is still no stream since the last one ended
            had_pictures = self._state is CameraState.STREAMING
            self._change(CameraState.LOST, reason, text, hint)
            pause_s = FIRST_PAUSE_S if had_pictures else min(pause_s * 2, self._longest_pause_s())
            self._line.health.retire(self._stage)  # a camera that is away is no stalled stage
            self._stop.wait(pause_s)

    def _longest_pause_s(self) -> float:
        return self._camera.retry_max_s if isinstance(self._camera, LiveCamera) else FIRST_PAUSE_S

    def _read_once(self) -> SourceError | None:
        """Read from opening to the end or the loss of the source; gives the reason of a loss."""
        try:
            with self._line.open(self._camera, self._line.networks) as source:
                self._read_all(source)
        except SourceError as error:
            return error
        finally:
            self._give_up_asked()
        return None

    def _read_all(self, source: Source) -> None:
        next_due = time.monotonic()
        self._last_count = None
        self._is_keyless = False
        while not self._is_over():
            self._line.health.beat(self._stage)
            if not self._may_read():
                continue
            if not isinstance(self._camera, LiveCamera) and (rate := self._camera.rate) > 0:
                if self._stop.wait(max(0.0, next_due - time.monotonic())):
                    return
                next_due = max(next_due + 1 / rate, time.monotonic() - 1 / rate)
            try:
                read = source.read()
            except FrameError as error:
                self._take_fault(error)
                continue
            if read is None:
                return
            self._take(read)

    def _is_over(self) -> bool:
        """Whether the reader was told to end, and no graph has to say anything that would still come in time."""
        if not self._stop.is_set():
            return False
        now_s = time.monotonic()
        return all(frame.deadline_s <= now_s for frame in self._asked.values())

    def _may_read(self) -> bool:
        """Wait until the line has room for a frame. It makes none when it ends, but what a graph was asked may come."""
        if self._stop.is_set():
            return True
        return self._line.wait_for_room(self._camera.id, 0.5) and not self._stop.is_set()

    def _take(self, read: Picture | Seen | Scored | Idle) -> None:
        """Hand on what the source gave."""
        if isinstance(read, Picture):
            self._count_gap(read.trigger_count)
            self._refuse_frozen(read)
            self._hand_over(read)
        elif isinstance(read, Scored):
            self._answer(read)
        elif isinstance(read, Seen) and not self._stop.is_set():
            self._hand_over_seen(read)
        elif read is IDLE and isinstance(self._camera, LiveCamera) and self._camera.is_triggered:
            self._change(CameraState.STREAMING)

    def _take_fault(self, error: FrameError) -> None:
        self._count_gap(error.trigger_count)
        if error.reason == "no_key_frame" and error.part_id is None:
            self._count_keyless()
        else:
            self._hand_over_fault(error)

    def _count_gap(self, count: int | None) -> None:
        """Report the frames that the camera counted and that never came."""
        last, self._last_count = self._last_count, count
        if count is not None and last is not None and count > last + 1:
            self._line.metrics.dropped(self._camera.id, "missed", count - last - 1)
            log.warning("frames missed", camera=self._camera.id, missed=count - last - 1)

    def _count_keyless(self) -> None:
        """Count a frame that came before the stream's first key frame and names no part: none was due for it."""
        self._line.metrics.dropped(self._camera.id, "no_key_frame")
        if not self._is_keyless:
            self._is_keyless = True
            log.info("stream joined between two key frames: frames are not seen until the next", camera=self._camera.id)

    def _refuse_frozen(self, picture: Picture) -> None:
        """Give up a camera that repeats itself bit for bit: its part would be judged by the picture of another."""
        limit_s = self._camera.frozen_after_s if isinstance(self._camera, LiveCamera) else None
        if limit_s is None:
            return
        digest = zlib.crc32(np.ascontiguousarray(picture.image).data)
        if self._still is None or digest != self._still[0]:
            self._still = (digest, picture.captured_s)
        still_s = picture.captured_s - self._still[1]
        if still_s >= limit_s:
            stamp = picture.captured_at, picture.captured_s, picture.part_id, picture.part_id_source
            self._accept(None, *stamp, picture.trigger_count, Cause.CAMERA_LOST)
            text = f"the same picture for {still_s:.1f} s"
            raise SourceError(text, reason="frozen_picture", hint="restart the camera; see `frozen_after_s`")

    def _hand_over(self, picture: Picture) -> None:
        self._change(CameraState.STREAMING)
        height, width = picture.image.shape[:2]
        if wrong := self._wrong_size(width, height):
            self._hand_over_fault(
                FrameError(wrong, part_id=picture.part_id, part_id_source=picture.part_id_source), picture
            )
            return
        self._frame_fault = ""
        view = self._view
        image = picture.image if view is None else cut_region(picture.image, view.crop, view.rotate, self._inside)
        image = to_model_size(image, *self._model_size)
        self._accept(
            image,
            picture.captured_at,
            picture.captured_s,
            picture.part_id,
            picture.part_id_source,
            picture.trigger_count,
        )

    def _hand_over_seen(self, seen: Seen) -> None:
        """Hand on a frame whose picture a graph keeps: it has asked Triton at this moment."""
        self._change(CameraState.STREAMING)
        if wrong := self._wrong_size(*seen.size):
            self._hand_over_fault(FrameError(wrong), seen)
            return
        self._frame_fault = ""
        self._asked[seen.number] = self._accept(None, seen.captured_at, seen.captured_s, None, None)
        if len(self._asked) > _MOST_ASKED:
            del self._asked[next(iter(self._asked))]

    def _answer(self, scored: Scored) -> None:
        """Hand on what a graph says of a frame; of one that was not taken, nothing."""
        frame = self._asked.pop(scored.number, None)
        if frame is None:
            return
        self._line.answer(
            Inference(
                frame,
                scores=scored.scores,
                anomaly_map=scored.anomaly_map,
                model=scored.model,
                cause=scored.cause,
                sent_s=frame.captured_s,
                received_s=scored.received_s,
            )
        )

    def _give_up_asked(self) -> None:
        """Tell of the frames that a graph will never say anything of: it was closed, or it is lost."""
        for frame in self._asked.values():
            self._line.answer(Inference(frame, cause=Cause.TRITON_UNAVAILABLE, sent_s=frame.captured_s))
        self._asked.clear()

    def _wrong_size(self, width: int, height: int) -> str:
        """Say what is wrong with a picture's size; '' when it is the camera's."""
        expected = self._camera.picture_size if self._view is None else list(self._view.picture)
        if expected is None or expected == [width, height]:
            return ""
        return f"picture is {width} x {height}, `picture_size` says {expected[0]} x {expected[1]}"

    def _hand_over_fault(self, error: FrameError, picture: Picture | Seen | None = None) -> None:
        if str(error) != self._frame_fault:  # once a spell: a camera of the wrong size would fill the log
            self._frame_fault = str(error)
            log.warning("frame not usable", camera=self._camera.id, cause=Cause.FRAME_CORRUPT.value, error=str(error))
        captured_at = picture.captured_at if picture is not None else datetime.now(UTC)
        captured_s = picture.captured_s if picture is not None else time.monotonic()
        trigger_count = picture.trigger_count if isinstance(picture, Picture) else error.trigger_count
        self._accept(
            None, captured_at, captured_s, error.part_id, error.part_id_source, trigger_count, Cause.FRAME_CORRUPT
        )

    def _accept(
        self,
        image: Image | None,
        captured_at: datetime,
        captured_s: float,
        part_id: str | None,
        part_id_source: str | None,
        trigger_count: int | None = None,
        cause: Cause | None = None,
    ) -> Frame:
        self._number += 1
        if part_id is not None and self._round:
            part_id = f"{part_id}#{self._round}"
        is_graphs = image is None and cause is None  # decoded and sent when it was seen
        ready_s = captured_s if is_graphs else time.monotonic()
        frame = Frame(
            camera_id=self._camera.id,
            station=self._camera.station,
            product=self._camera.product,
            number=self._number,
            part_id=part_id or f"{self._camera.id}-{self._line.run}-{self._number}",
            part_id_source=part_id_source or "generated",
            captured_at=captured_at,
            captured_s=captured_s,
            deadline_s=captured_s + self._line.budget_s,
            image=image,
            cause=cause,
            trigger_count=trigger_count,
            view=self._view,
            ready_s=ready_s,
        )
        self._line.metrics.stage("ingest", ready_s - captured_s)
        self._line.accept(frame)
        return frame

    def _change(self, state: CameraState, reason: str = "", text: str = "", hint: str = "") -> None:
        if (state, reason) == (self._state, self._reason):
            return
        self._state, self._reason = state, reason
        self._line.metrics.camera_state(self._camera.id, state, reason)
        self._line.announce(self._camera.id, state, reason)
        bad = state in {CameraState.LOST, CameraState.FAILED}
        extra = {key: value for key, value in {"reason": reason, "error": text, "hint": hint}.items() if value}
        (log.warning if bad else log.info)("camera " + state.value, camera=self._camera.id, **extra)
