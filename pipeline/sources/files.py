"""Pictures from disk: a folder of images, or a video file. For trials, tests and replay.

A picture's header is read and its size checked before a pixel is decoded (a 125 KB PNG can ask for gigabytes), and a
file that ends too early is an error, not a half-grey picture.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from pipeline.errors import FrameError, SourceError
from pipeline.region import MAX_PIXELS
from pipeline.sources.stream import StreamSource
from pipeline.types import Image, Picture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# What is none of these is no picture: Pillow would run Ghostscript for a PostScript file of any name.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_MODES = frozenset({"1", "L", "P", "RGB", "RGBA"})


class FolderSource:
    """The pictures of a folder and its subfolders, in the order of their names; the part id is the file's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: Iterator[Path] = iter(())

    def __enter__(self) -> FolderSource:
        if not self._folder.is_dir():
            raise SourceError(f"folder {self._folder} does not exist", reason="not_found", final=True)
        paths = sorted(path for path in self._folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            kinds = ", ".join(sorted(SUFFIXES))
            raise SourceError(f"folder {self._folder} holds no picture ({kinds})", reason="no_frames", final=True)
        self._paths = iter(paths)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._paths = iter(())

    def read(self) -> Picture | None:
        """Give the next picture; None at the end. Raises FrameError, with the part id, for one that is unusable."""
        path = next(self._paths, None)
        if path is None:
            return None
        name = path.relative_to(self._folder).as_posix()
        part_id = os.fsencode(name).decode("utf-8", errors="replace")  # a name in another encoding is still told
        captured_at, captured_s = datetime.now(UTC), time.monotonic()
        try:
            image = read_picture(path)
        except FrameError as error:
            raise FrameError(str(error), part_id=part_id, part_id_source="file") from None
        return Picture(image, captured_at, captured_s, part_id, "file")


def open_video(path: Path) -> StreamSource:
    """Make the source of a video file."""
    return StreamSource(str(path), shown=str(path), timeouts_s=(10.0, 10.0), options={})


def read_picture(path: Path) -> Image:
    """Decode one picture to HWC uint8 RGB. Raises FrameError naming the file and the fault.

    A noted orientation (EXIF) is not applied: models are trained on pixels as they are stored; `region.rotate` turns.
    """
    try:
        with PillowImage.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise FrameError(f"{path.name}: {size} is over the limit of {MAX_PIXELS} pixels")
            if picture.mode not in _MODES or _is_deep(picture):
                raise FrameError(f"{path.name}: pixel format {picture.mode} is not 8-bit grey or RGB; convert it")
            return np.asarray(picture.convert("RGB"))
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning):
        raise FrameError(f"{path.name}: the picture is far over the limit of {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise FrameError(f"{path.name}: not a picture") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
        raise FrameError(f"{path.name}: cut or corrupt: {error}") from None


def _is_deep(picture: PillowImage.Image) -> bool:
    """Say whether a colour picture has 16 bits a channel, of which Pillow would keep the upper eight in silence."""
    return any(";16" in str(tile.args) for tile in getattr(picture, "tile", ()))
