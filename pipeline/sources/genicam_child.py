"""One GenICam camera, read through Aravis: the program of a camera's own process.

Runs in the distribution's Python, which has the GObject bindings, and imports nothing of ours: `genicam` is the other
end, `link` says how pixels and messages are handed over. Started by `forkserver` with two inherited descriptors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

# As in `link`, which this Python cannot import; a test holds them equal.
SLOTS = 3
SLOT_BYTES = 192 * 2**20
MAX_MESSAGE = 65_536

ALIVE_EVERY_S = 1.0
FORMATS = {"Mono8": 1, "BayerRG8": 1, "BayerGR8": 1, "BayerGB8": 1, "BayerBG8": 1, "RGB8": 3}
Binding = Any  # of GObject: these have no types
PACKAGES = "apt-get install python3-gi gir1.2-aravis-0.8; of the images take worker-genicam"


class LostError(Exception):
    """The camera is of no use any more: the last message to the reader."""

    def __init__(self, text: str, reason: str, *, hint: str = "", final: bool = False) -> None:
        super().__init__(text)
        self.message = {"kind": "lost", "text": text, "reason": reason, "hint": hint, "final": final}


class Link:
    """The way to the reader, as `link.Link`."""

    def __init__(self, link: int, memory: int) -> None:
        self._link = socket.socket(fileno=link)
        self._memory = memory
        self._free = list(range(SLOTS))

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self._link.recv(MAX_MESSAGE))
        return settings

    def say(self, message: dict[str, Any]) -> None:
        self._link.send(json.dumps(message).encode())

    def picture(self, pixels: bytes, head: dict[str, Any]) -> None:
        while not self._free:
            answer = self._link.recv(1)
            if not answer:
                raise ConnectionResetError("the reader is gone")
            self._free.append(answer[0])
        slot = self._free.pop()
        os.pwrite(self._memory, pixels, slot * SLOT_BYTES)
        self.say({"kind": "picture", "slot": slot, "part": [None, None], **head})


class Counter:
    """The camera's frame numbers as one count that never wraps; a number that steps back for no reason adds one."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._count = 0

    @property
    def is_new(self) -> bool:
        return self._last is None

    def of(self, number: int) -> int:
        last, self._last = self._last, number
        if last is None:
            self._count = 1
        elif number > last:
            self._count += number - last
        elif last - number > 0x8000 and last <= 0xFFFF:  # GigE Vision 1: 16 bits, and 0 is left out
            self._count += number - last + 0xFFFF
        else:
            self._count += 1
        return self._count


class Camera:
    """An open camera and its stream."""

    def __init__(self, aravis: Binding, settings: dict[str, Any]) -> None:
        self._aravis = aravis
        self._settings = settings
        self._camera = aravis.Camera.new(settings["address"] or None)
        self._is_gone = False
        device = self._camera.get_device()
        if self._camera.is_gv_device() and not device.is_controller():
            raise LostError("the camera is held by another program", "in_use", hint="end it; a camera has one reader")
        device.connect("control-lost", self._on_control_lost)
        self._configure()
        self._chunks = self._camera.create_chunk_parser() if settings["chunk_data"] else None
        self._format = self._camera.get_pixel_format_as_string()
        if self._format not in FORMATS:
            raise LostError(f"pixel format {self._format} is not read", "codec_unsupported", hint="set `pixel_format`")
        self._stream = self._camera.create_stream(None, None)
        if self._camera.is_gv_device():
            resend = aravis.GvStreamPacketResend
            self._stream.set_property("packet-resend", resend.ALWAYS if settings["resend"] else resend.NEVER)
        payload = self._camera.get_payload()
        for _ in range(settings["buffers"]):
            self._stream.push_buffer(aravis.Buffer.new_allocate(payload))
        self._counter = Counter()

    def _on_control_lost(self, device: Binding) -> None:
        del device
        self._is_gone = True

    def _configure(self) -> None:
        camera, settings = self._camera, self._settings
        camera.set_acquisition_mode(self._aravis.AcquisitionMode.CONTINUOUS)
        if settings["pixel_format"] is not None:
            camera.set_pixel_format_from_string(settings["pixel_format"])
        if settings["exposure_us"] is not None:
            if camera.is_exposure_auto_available():
                camera.set_exposure_time_auto(self._aravis.Auto.OFF)
            camera.set_exposure_time(settings["exposure_us"])
        if settings["gain"] is not None:
            if camera.is_gain_auto_available():
                camera.set_gain_auto(self._aravis.Auto.OFF)
            camera.set_gain(settings["gain"])
        self._configure_trigger()
        if camera.is_gv_device():
            self._configure_packets()
        if settings["chunk_data"]:
            camera.set_chunks("FrameID,Timestamp")

    def _configure_trigger(self) -> None:
        camera, settings = self._camera, self._settings
        if settings["trigger"] == "off":
            if camera.is_feature_available("TriggerSelector"):
                camera.clear_triggers()
            if settings["rate"] is not None:
                camera.set_frame_rate(settings["rate"])
            return
        camera.set_trigger("Software" if settings["trigger"] == "software" else settings["trigger"])
        if settings["trigger"] != "software":
            camera.set_string("TriggerActivation", settings["activation"])

    def _configure_packets(self) -> None:
        size, delay_ns = self._settings["packet_size"], self._settings["packet_delay_ns"]
        if size == "auto":
            self._camera.gv_auto_packet_size()
        elif size is not None:
            self._camera.gv_set_packet_size(size)
        if delay_ns is not None:
            self._camera.gv_set_packet_delay(delay_ns)

    def run(self, link: Link) -> None:
        """Forward pictures until the camera is lost or this process is told to end."""
        self._camera.start_acquisition()
        link.say({"kind": "opened"})
        software = self._settings["trigger"] == "software"
        may_be_silent = self._settings["trigger"].startswith("Line")
        heard_s = said_s = due_s = time.monotonic()
        while not self._is_gone:
            now_s = time.monotonic()
            if software and now_s >= due_s:
                self._camera.software_trigger()
                due_s = max(due_s + 1 / self._settings["rate"], now_s)
            wait_s = min(ALIVE_EVERY_S, due_s - now_s) if software else ALIVE_EVERY_S
            buffer = self._stream.timeout_pop_buffer(max(1, int(wait_s * 1e6)))
            now_s = time.monotonic()
            if buffer is not None:
                heard_s = said_s = now_s
                self._forward(buffer, link)
                self._stream.push_buffer(buffer)
            elif not may_be_silent and now_s - heard_s > self._settings["read_timeout_s"]:
                reason = "no_frames" if self._counter.is_new else "timeout"
                raise LostError("the camera sends no picture", reason, hint="check the cable and `packet_size`")
            elif now_s - said_s >= ALIVE_EVERY_S:
                said_s = now_s
                link.say({"kind": "alive"})
        raise LostError("the camera answers no more", "timeout", hint="check the cable and the camera's power")

    def _forward(self, buffer: Binding, link: Link) -> None:
        # Before the wait for a slot: the time since the picture's first packet is its age.
        age_s = max(0.0, (time.time_ns() - buffer.get_system_timestamp()) / 1e9)
        captured = {"at": time.time() - age_s, "s": time.monotonic() - age_s}
        number, device_ns = buffer.get_frame_id(), buffer.get_timestamp()
        if buffer.get_status() == self._aravis.BufferStatus.SUCCESS:
            if self._chunks is not None:
                number = self._chunks.get_integer_value(buffer, "ChunkFrameID")
                device_ns = self._chunks.get_integer_value(buffer, "ChunkTimestamp")
            width, height = buffer.get_image_width(), buffer.get_image_height()
            channels = FORMATS[self._format]
            pixels = buffer.get_image_data()
            if len(pixels) == width * height * channels:
                shape = [height, width] if channels == 1 else [height, width, channels]
                head = {"shape": shape, "format": self._format, "count": self._counter.of(number)}
                link.picture(pixels, {**head, **captured, "device_ns": device_ns})
                return
        status = buffer.get_status().value_nick
        text = f"a picture arrived incomplete ({status})"
        link.say({"kind": "damaged", "text": text, "part": [None, None], "count": self._counter.of(number), **captured})

    def close(self) -> None:
        """Give the camera free, so that it can be opened again at once."""
        self._camera.stop_acquisition()
        if self._camera.is_gv_device():
            self._camera.get_device().leave_control()


def explain(aravis: Binding, error: Binding) -> LostError:
    """Map an error of Aravis to a reason code."""
    if error.domain != "arv-device-error-quark":
        return LostError(error.message, "setting_refused", hint="check this camera's settings", final=True)
    codes = aravis.DeviceError
    reasons = {
        int(codes.NOT_FOUND): ("not_found", "check `address` and the network; `arv-tool-0.8` lists the cameras"),
        int(codes.TIMEOUT): ("timeout", "check the cable and the camera's power"),
        int(codes.NOT_CONNECTED): ("timeout", "check the cable and the camera's power"),
        int(codes.TRANSFER_ERROR): ("timeout", "check the cable and the camera's power"),
        int(codes.NOT_CONTROLLER): ("in_use", "another program holds this camera"),
        int(codes.PROTOCOL_ERROR_ACCESS_DENIED): ("in_use", "another program holds this camera"),
        int(codes.PROTOCOL_ERROR_BUSY): ("in_use", "another program holds this camera"),
    }
    if error.code in reasons:
        reason, hint = reasons[error.code]
        return LostError(error.message, reason, hint=hint)
    return LostError(error.message, "setting_refused", hint="check this camera's settings", final=True)


def read(link: Link, settings: dict[str, Any]) -> None:
    """Open the camera and forward its pictures. Raises LostError."""
    try:
        import gi

        gi.require_version("Aravis", "0.8")
        from gi.repository import Aravis, GLib
    except (ImportError, ValueError) as error:
        raise LostError(f"Aravis is missing: {error}", "driver_missing", hint=PACKAGES, final=True) from None
    camera = None
    try:
        camera = Camera(Aravis, settings)
        camera.run(link)
    except GLib.Error as error:
        raise explain(Aravis, error) from None
    finally:
        if camera is not None:
            with suppress(GLib.Error):  # a camera that is away needs no goodbye
                camera.close()


def main(link: Link) -> int:
    """0 when it was told to end, 1 when the camera was lost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        read(link, link.settings())
    except LostError as lost:
        link.say(lost.message)
    except OSError:  # the reader is gone
        pass
    return 1


if __name__ == "__main__":
    sys.exit(main(Link(int(sys.argv[1]), int(sys.argv[2]))))
