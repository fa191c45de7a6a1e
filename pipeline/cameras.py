"""What a camera is set to: a block of the line file, and the value of a record of the camera pool.

Also the base of every block of settings and the reading of secrets, which cameras need. Knows no line and opens no
camera. Called by `config`, `ingest` and `sources`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.region import RegionOfInterest

PRODUCT_PATTERN = r"^[a-z][a-z0-9-]{0,39}$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Product = Annotated[str, Field(pattern=PRODUCT_PATTERN)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    overflow: Literal["wait", "drop_oldest"] = "drop_oldest"
    """What a full queue does: `wait` holds the reader back (files), `drop_oldest` gives up the oldest waiting frame,
    whose part becomes UNINSPECTED with cause `queue_full` (live cameras)."""
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


class RtspCamera(_Camera):
    """An RTSP stream, read over TCP."""

    type: Literal["rtsp"]
    url: Annotated[str, Field(pattern=r"^rtsps?://")]
    """Address without credentials, `rtsp://host:554/path`."""
    user: str = ""
    """User name, when the camera asks for one."""
    password_file: Path | None = None
    """File that holds the camera's password, and nothing else."""
    connect_timeout_s: Positive = 5.0
    """Longest wait for the camera to answer."""
    read_timeout_s: Positive = 3.0
    """Longest silence before the stream counts as lost and is opened anew."""
    retry_max_s: Positive = 15.0
    """Longest pause between two attempts; pauses double from 0.5 s."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        return without_credentials(url)

    def address(self) -> str:
        """Give the address with credentials, to be handed to the decoder and to nothing else."""
        if not self.user:
            return self.url
        parts = urlsplit(self.url)
        password = read_secret(self.password_file).get_secret_value() if self.password_file else ""
        netloc = f"{quote(self.user, safe='')}:{quote(password, safe='')}@{parts.netloc}"
        return urlunsplit(parts._replace(netloc=netloc))


class _Paced(_Camera):
    queue_frames: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many pictures may wait for inference."""
    overflow: Literal["wait", "drop_oldest"] = "wait"
    """What a full queue does: `wait` holds the reader back, `drop_oldest` gives up the oldest waiting picture, whose
    part becomes UNINSPECTED with cause `queue_full`."""
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


Camera = Annotated[RtspCamera | VideoCamera | FolderCamera, Field(discriminator="type")]


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
