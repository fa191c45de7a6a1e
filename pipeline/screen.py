"""What a terminal shows: the live table of a running line, and one line a verdict. Asks nobody, changes nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.metrics import CameraSnapshot, LineSnapshot
from pipeline.types import CameraState

_STATE_STYLES = {CameraState.LOST: "bold red", CameraState.FAILED: "bold red", CameraState.CONNECTING: "yellow"}


def draw(snapshot: LineSnapshot, rates: dict[str, float], *, elapsed_s: float) -> Group:
    """Lay out a snapshot; `rates` is frames/s by camera over the last moments."""
    table = Table(expand=False, pad_edge=False, header_style="bold")
    for title in ("camera", "product", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("frames/s", "OK", "NG", "REVIEW", "UNINSP.", "p50 ms", "p99 ms", "queue"):
        table.add_column(title, justify="right", no_wrap=True)
    for camera in snapshot.cameras:
        table.add_row(*_row(camera, rates.get(camera.camera_id, 0.0)))
    return Group(table, _footer(snapshot, sum(rates.values()), elapsed_s))


def frame_rates(before: LineSnapshot, now: LineSnapshot, elapsed_s: float) -> dict[str, float]:
    """Give frames/s by camera between two snapshots; a camera that came meanwhile starts at none."""
    frames = {camera.camera_id: camera.frames for camera in before.cameras}
    return {
        camera.camera_id: (camera.frames - frames.get(camera.camera_id, camera.frames)) / elapsed_s
        for camera in now.cameras
    }


def verdict_line(event: dict[str, Any]) -> str:
    """Put an event of the verdict topic into one line; a record that is no verdict is shown as such."""
    try:
        return _judged_line(event)
    except (KeyError, TypeError, ValueError):
        error = event.get("error", "no verdict of this line")
        return f"{event['key'] or '-':24} {error} (partition {event['partition']}, offset {event['offset']})"


def _judged_line(event: dict[str, Any]) -> str:
    data = event["data"]
    fused = (data["views"][0]["scores"] or {}).get("fused") if data["views"] else None
    score = "-" if fused is None else f"{fused:.3f}"
    threshold = data["threshold"]
    limit = "-" if threshold is None else f"{threshold['ng']:.3f} v{threshold['version']}"
    missing = [f"{view['cameraId']} missing" for view in data.get("missingViews", ())]
    clock = event["attributes"]["time"][11:23]
    return (
        f"{clock}  {event['key'] or '-':22} #{data['sequence']:<6} {data['verdict']:11} {data['partId']:32} "
        f"score {score:>8} / {limit:14} {','.join([*data['reasonCodes'], *missing])}"
    )


def _row(camera: CameraSnapshot, rate: float) -> list[Text | str]:
    state = camera.state.value + (f" ({camera.reason})" if camera.reason else "")
    judged = camera.judgements
    return [
        camera.camera_id,
        camera.product,
        Text(state, style=_STATE_STYLES.get(camera.state, "")),
        f"{rate:.1f}",
        str(judged["OK"]),
        Text(str(judged["NG"]), style="red" if judged["NG"] else ""),
        Text(str(judged["REVIEW"]), style="yellow" if judged["REVIEW"] else ""),
        Text(str(judged["UNINSPECTED"]), style="magenta" if judged["UNINSPECTED"] else ""),
        _ms(camera.p50_ms),
        _ms(camera.p99_ms),
        str(camera.queued),
    ]


def _footer(snapshot: LineSnapshot, rate: float, elapsed_s: float) -> Text:
    open_parts = snapshot.triggered - snapshot.judged
    text = Text(
        f"{elapsed_s:5.0f} s   {rate:.1f} frames/s   parts {snapshot.triggered}   open {open_parts}   "
        f"acknowledged by Kafka {snapshot.acknowledged}   "
    )
    text.append(f"lost {snapshot.undelivered}", style="bold red" if snapshot.undelivered else "")
    text.append(f"   p50 {_ms(snapshot.p50_ms)} ms   p99 {_ms(snapshot.p99_ms)} ms")
    return text


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
