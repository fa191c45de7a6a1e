"""Reads MVTec LOCO folders and single pictures; every error names the file.

Checks headers before decoding (a 125 KB PNG can unpack to gigabytes) and refuses cut files, which OpenCV would decode
without a word. Never keeps more than the pictures at model size. Called by `fit`, `evaluate` and `cli`.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

Image = NDArray[np.uint8]

PREPROCESSING = "resize-area-v1"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
TEST_KINDS = {"good": "good", "logical": "logical_anomalies", "structural": "structural_anomalies"}
# The largest LOCO picture has 2.2 megapixels; 64 leaves room for line cameras and stops picture bombs at 192 MB.
MAX_PIXELS = 64_000_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers of JPEG: C0 to CF less DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class LocoFolder:
    """The picture files of one product in MVTec LOCO layout; `test` is empty where the folder has none."""

    root: Path
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: dict[str, tuple[Path, ...]]


def to_model_size(image: Image, height: int, width: int) -> Image:
    """Resizes (h, w, 3) uint8 RGB to (height, width, 3) by area means: the preprocessing 'resize-area-v1'."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def open_loco(root: Path, *, need_test: bool = False) -> LocoFolder:
    """Lists the pictures of a LOCO product folder; raises DataError where a needed split is missing or too small."""
    train = list_images(root / "train" / "good")
    validation = list_images(root / "validation" / "good")
    if len(train) < 2 or len(validation) < 2:
        raise DataError(f"data '{root}': needs two pictures each in train/good and validation/good to measure a spread")
    test: dict[str, tuple[Path, ...]] = {}
    if need_test or (root / "test").is_dir():
        test = {kind: list_images(root / "test" / folder) for kind, folder in TEST_KINDS.items()}
    return LocoFolder(root, train, validation, test)


def list_images(folder: Path) -> tuple[Path, ...]:
    """The PNG and JPEG files directly in `folder`, sorted by name; raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"data '{folder}': no such folder; expected the MVTec LOCO layout or a folder of pictures")
    files = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES))
    if not files:
        raise DataError(f"data '{folder}': holds no PNG or JPEG file")
    return files


def read_image(path: Path) -> Image:
    """Decodes one PNG or JPEG to (h, w, 3) uint8 RGB; grey becomes RGB. Raises DataError that names the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"picture '{path}': cannot be read ({error.strerror})") from error
    height, width = _checked_size(path, raw)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(f"picture '{path}': {width} x {height} pixels; at most {MAX_PIXELS} are accepted")
    decoded = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None or decoded.shape[:2] != (height, width):
        raise DataError(f"picture '{path}': cannot be decoded; is it damaged?")
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def check_readable(files: Iterable[Path]) -> None:
    """Decodes every file once; raises DataError that names the first bad one, before hours go into training."""
    for path in files:
        read_image(path)


def load_at_model_size(files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Reads pictures one by one into one (n, size, size, 3) uint8 array."""
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(files):
        images[index] = to_model_size(read_image(path), size, size)
    return images


def data_sha256(files: Sequence[Path], root: Path) -> str:
    """Hash over the names and bytes of `files`: says which data a model was fitted on."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _checked_size(path: Path, raw: bytes) -> tuple[int, int]:
    if raw.startswith(_PNG_SIGNATURE):
        return _png_size(path, raw)
    if raw.startswith(b"\xff\xd8"):
        return _jpeg_size(path, raw)
    raise DataError(f"picture '{path}': is neither PNG nor JPEG (first bytes {raw[:4].hex() or 'missing'})")


def _png_size(path: Path, raw: bytes) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    for kind, body in _png_chunks(path, raw):
        if kind == b"IHDR" and len(body) == 13:
            width, height = struct.unpack(">II", body[:8])
            size = (height, width)
        if kind == b"IEND" and size is not None:
            return size
    raise DataError(f"picture '{path}': the PNG is cut: its end is missing")


def _png_chunks(path: Path, raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        end = at + 12 + length
        if end > len(raw):
            return
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : end - 4]
        if zlib.crc32(kind + body) != int.from_bytes(raw[end - 4 : end], "big"):
            raise DataError(f"picture '{path}': the PNG is damaged: wrong checksum in chunk {kind!r}")
        yield kind, body
        at = end


def _jpeg_size(path: Path, raw: bytes) -> tuple[int, int]:
    if b"\xff\xd9" not in raw[-64:]:  # some cameras pad after the end marker
        raise DataError(f"picture '{path}': the JPEG is cut: its end marker is missing")
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", raw[at + 5 : at + 9])
            return height, width
        at += 1 if marker == 0xFF else 2 + length
    raise DataError(f"picture '{path}': the JPEG has no frame header")
