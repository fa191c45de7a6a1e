"""What a camera is set to: a block of the line file, and the value of a record of the camera pool.

Also the base of every block of settings and the reading of secrets, which cameras need. Knows no line and opens no
camera. Called by `config`, `ingest` and `sources`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.region import RegionOfInterest

PRODUCT_PATTERN = r"^[a-z][a-z0-9-]{0,39}$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Product = Annotated[str, Field(pattern=PRODUCT_PATTERN)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Overflow = Literal["wait", "drop_oldest", "drop_late"]


class Block(BaseModel):
    """One mapping of the file: closed, immutable, strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Camera(Block):
    id: Name
    """Name of the camera, unique on the line; it appears in every event and metric."""
    product: Product
    """Which product this camera looks at: the name of an ensemble in the model repository."""
    station: Name = "station-1"
    """Station of the line; verdicts are in order within `<line>/<station>`."""
    queue_frames: Annotated[int, Field(ge=1, le=1000)] = 16
    """How many frames of this camera may wait for inference."""
    overflow: Overflow = "drop_oldest"
    """What a full queue does: `wait` holds the reader back and gives up nothing (files, triggered cameras),
    `drop_oldest` gives up the oldest waiting frame (live cameras; its part is UNINSPECTED with cause `queue_full`),
    `drop_late` gives up a waiting frame only once it can no longer be judged in time (cause `deadline`), and until then
    holds the reader back."""
    picture_size: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)] | None = None
    """Width and height that every picture must have; another size is `frame_corrupt`. Unset: any size is resized."""
    region: RegionOfInterest | None = None
    """Which part of the picture is inspected. Unset: the region that the model was trained with, or the whole picture
    where it was trained on whole ones."""

    @model_validator(mode="after")
    def _one_size(self) -> _Camera:
        if self.region is not None and self.picture_size not in (None, self.region.picture_size):
            raise ValueError("`picture_size` and `region.picture_size` differ: a camera has one")
        return self


class LiveCamera(_Camera):
    """What every real camera has: it may go away, and is then opened anew."""

    connect_timeout_s: Positive = 5.0
    """Longest wait for the camera to answer."""
    read_timeout_s: Positive = 3.0
    """Longest silence before the camera counts as lost and is opened anew; a triggered one may be silent for ever."""
    retry_max_s: Positive = 15.0
    """Longest pause between two attempts; pauses double from 0.5 s."""
    frozen_after_s: Positive | None = None
    """How long the same picture, bit for bit, may repeat before the camera counts as lost (`frozen_picture`). Unset
    never: a still scene through a video codec repeats itself rightly. Worth setting where a sensor's noise comes
    through, as with GenICam cameras."""

    @property
    def is_triggered(self) -> bool:
        """Whether the camera waits for its trigger, so that silence is no fault."""
        return False


class RtspCamera(LiveCamera):
    """An RTSP stream, read over TCP."""

    type: Literal["rtsp"]
    url: Annotated[str, Field(pattern=r"^rtsps?://")]
    """Address without credentials, `rtsp://host:554/path`."""
    user: str = ""
    """User name, when the camera asks for one."""
    password_file: Path | None = None
    """File that holds the camera's password, and nothing else."""
    decoder: Literal["ffmpeg", "gstreamer", "deepstream"] = "ffmpeg"
    """Who decodes: FFmpeg or GStreamer in a process beside the worker, or DeepStream on the GPU, also beside it.
    DeepStream reads no part ids from the stream; its cameras of one `picture_size` share a process."""
    inference: Literal["line", "graph"] = "line"
    """Who asks Triton: the line, or with `decoder: deepstream` the graph that decodes, so that pictures stay on the
    GPU and only scores and maps leave it. All cameras of a product have the same; those of a graph have no `region`, no
    queue and no picture in evidence, `free_run` stations and one address of Triton, and are of no pool."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        return without_credentials(url)

    @model_validator(mode="after")
    def _graph_fits(self) -> Self:
        if self.inference == "line":
            return self
        if self.decoder != "deepstream":
            raise ValueError("`inference: graph` needs `decoder: deepstream`")
        why = {
            "region": "the graph shows the network whole pictures",
            "frozen_after_s": "its pictures stay on the GPU, where nobody compares them",
            "queue_frames": "the graph has a queue of its own",
            "overflow": "the graph has a queue of its own",
        }
        for key, reason in why.items():
            if key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"`inference: graph` goes without `{key}`: {reason}")
        return self

    def address(self) -> str:
        """Give the address with credentials, to be handed to the decoder and to nothing else."""
        if not self.user:
            return self.url
        parts = urlsplit(self.url)
        password = read_secret(self.password_file).get_secret_value() if self.password_file else ""
        netloc = f"{quote(self.user, safe='')}:{quote(password, safe='')}@{parts.netloc}"
        return urlunsplit(parts._replace(netloc=netloc))


class GenicamCamera(LiveCamera):
    """A GigE Vision or USB3 Vision camera, read through Aravis (packages python3-gi and gir1.2-aravis-0.8)."""

    type: Literal["genicam"]
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{0,100}$")] = ""
    """Name (`<vendor>-<serial>`), serial number or IP address; empty takes the first one found."""
    trigger: Annotated[str, Field(pattern=r"^(off|software|Line[0-9]{1,2})$")] = "off"
    """What makes a picture: `off` runs free, `software` is asked for by the worker `rate` times a second, `Line0`...
    is the camera's input of that name. A triggered camera never drops by default."""
    activation: Literal["RisingEdge", "FallingEdge", "AnyEdge", "LevelHigh", "LevelLow"] = "RisingEdge"
    """Which change of the input line is the trigger."""
    rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    """Pictures a second, free running or by software trigger; unset runs free at the camera's own rate."""
    exposure_us: Positive | None = None
    """Exposure in microseconds, automatic exposure off; unset leaves the camera's own."""
    gain: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Gain in the camera's unit (mostly dB), automatic gain off; unset leaves the camera's own."""
    pixel_format: Literal["Mono8", "BayerRG8", "BayerGR8", "BayerGB8", "BayerBG8", "RGB8"] | None = None
    """Unset takes the camera's own, which must be one of these."""
    packet_size: Annotated[int, Field(ge=220, le=65_535)] | Literal["auto"] | None = None
    """GigE Vision stream packet in bytes: 1500 on a plain network, 9000 with jumbo frames, `auto` tries what passes;
    unset leaves the camera's own."""
    packet_delay_ns: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Pause between two packets, for cameras that share a link; unset leaves the camera's own."""
    resend: bool = True
    """Ask for lost packets again."""
    chunk_data: bool = False
    """Take frame number and time from the camera's chunk data instead of the stream's own."""
    buffers: Annotated[int, Field(ge=2, le=200)] = 8
    """Pictures that may wait between network and reader; one that finds none free is a gap in the camera's count."""

    @property
    def is_triggered(self) -> bool:
        """Whether the camera waits for its trigger, so that silence is no fault."""
        return self.trigger != "off"

    @model_validator(mode="before")
    @classmethod
    def _never_drop_when_triggered(cls, block: object) -> object:
        if isinstance(block, dict) and block.get("trigger", "off") != "off":
            return {"overflow": "wait", **block}
        return block

    @model_validator(mode="after")
    def _software_has_a_rate(self) -> Self:
        if self.trigger == "software" and self.rate is None:
            raise ValueError("trigger `software` needs `rate`: how often the worker asks for a picture")
        return self


class UsbCamera(LiveCamera):
    """A USB camera, or any other Video4Linux2 device; `picture_size` is asked of it."""

    type: Literal["usb"]
    device: Annotated[str, Field(pattern=r"^/dev/")]
    """The device, `/dev/video0`; better a name that stays with the camera, `/dev/v4l/by-id/...`."""
    rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    """Pictures a second to ask for; unset leaves the camera's own."""

    @field_validator("device", mode="before")
    @classmethod
    def _of_number(cls, device: object) -> object:
        return f"/dev/video{device}" if isinstance(device, int) else device


class _Paced(_Camera):
    queue_frames: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many pictures may wait for inference."""
    overflow: Overflow = "wait"
    """What a full queue does: `wait` holds the reader back, `drop_oldest` gives up the oldest waiting picture (its part
    is UNINSPECTED with cause `queue_full`), `drop_late` only one that can no longer be judged in time (`deadline`)."""
    path: Path
    """File or folder to read."""
    rate: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    """Pictures a second; 0 reads as fast as the line takes them."""
    loop: bool = False
    """Start over at the end."""


class VideoCamera(_Paced):
    """A video file."""

    type: Literal["video"]


class FolderCamera(_Paced):
    """A folder of PNG, JPEG, BMP, TIFF or WebP pictures, read in the order of their names."""

    type: Literal["folder"]


class PoolMember(Block):
    """What a record of the camera pool says besides the camera's own block."""

    pool: Name = "default"
    """Whose workers read this camera."""


AnyCamera = RtspCamera | GenicamCamera | UsbCamera | VideoCamera | FolderCamera
Camera = Annotated[AnyCamera, Field(discriminator="type")]


def graph_cameras(cameras: Iterable[Camera]) -> list[RtspCamera]:
    """Give those of some cameras whose graph asks Triton itself."""
    return [camera for camera in cameras if isinstance(camera, RtspCamera) and camera.inference == "graph"]


def without_credentials(url: str) -> str:
    if "@" in urlsplit(url).netloc:
        raise ValueError("credentials do not belong in the address: use `password_file`")
    return url


def read_secret(path: Path) -> SecretStr:
    """Read a secret from its file, without the newline that editors leave. Raises ConfigError."""
    try:
        return SecretStr(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"secret file {path} cannot be read: {error}", hint="check the path and its mode") from None
