"""Reads the pictures of MVTec LOCO, MVTec AD and plain folders; every error names the file and the remedy.

Checks headers before decoding (a 125 KB PNG can unpack to gigabytes) and refuses cut files, which OpenCV would decode
without a word. Never keeps more than the pictures at model size, never reads a mask (`masks` does). Called by `fit`,
`evaluate` and `cli`.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from training.errors import DataError
from training.region import RegionOfInterest, read_region

Image = NDArray[np.uint8]

PREPROCESSING = "resize-area-v1"
REGION = "region.yaml"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
# Pictures too, but not read: refused by name, for a picture left out without a word would be missed by nobody.
OTHER_SUFFIXES = frozenset({".bmp", ".gif", ".heic", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
TEST_KINDS = {"good": "good", "logical": "logical_anomalies", "structural": "structural_anomalies"}
# The largest LOCO picture has 2.2 megapixels; 64 leaves room for line cameras and stops picture bombs at 192 MB.
MAX_PIXELS = 64_000_000

_EXPECTED = "MVTec LOCO or MVTec AD (train/good, ...) or a folder of pictures, good ones in good/"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers of JPEG: C0 to CF less DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Layout(StrEnum):
    """How a data folder is laid out."""

    LOCO = "loco"
    MVTEC_AD = "mvtec-ad"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The picture files of one product. `test` has the kinds 'good', 'logical' and 'structural' that are there.

    It is empty where the folder has no test split; else it has 'good' and at least one kind of anomaly. `region` is
    what the folder's region.yaml says of the camera that took the pictures; None where there is no such file.
    """

    root: Path
    layout: Layout
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: dict[str, tuple[Path, ...]]
    region: RegionOfInterest | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a picture file says; `colour` is 'grey', 'rgb', 'palette' or 'cmyk'; `bits` a channel."""

    height: int
    width: int
    bits: int
    colour: str
    alpha: bool


def to_model_size(image: Image, height: int, width: int) -> Image:
    """Resizes (h, w, 3) uint8 RGB to (height, width, 3) by area means: the preprocessing 'resize-area-v1'."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def open_data(root: Path, *, need_test: bool = False) -> DataFolder:
    """Lists the pictures of a product; the folders that are there say which layout it is.

    - loco: train/good, validation/good, test/{good,logical_anomalies,structural_anomalies}
    - mvtec-ad: train/good, test/good, test/<defect>; every defect counts as structural
    - folder: good/ or pictures in the folder itself; pictures of any other sub-folder count as structural anomalies

    Where there is no validation folder, every fifth training picture is held out for it (`hold_out`), and in a plain
    folder with anomalies good test pictures in the same way. A region.yaml in the folder says which part of the
    pictures is looked at; see `region`. Raises DataError where a split is missing or too small.
    """
    layout = _layout(root)
    region = read_region(root / REGION)
    data = {Layout.LOCO: _open_loco, Layout.MVTEC_AD: _open_mvtec_ad, Layout.FOLDER: _open_folder}[layout](root)
    data = replace(data, region=region)
    if len(data.train) < 2 or len(data.validation) < 2:
        raise DataError(f"data '{root}': needs two pictures each in train/good and validation/good to measure a spread")
    if data.test and len(data.test) < 2:
        raise DataError(f"data '{root / 'test'}': holds no anomalies; add some, or remove the folder to fit without")
    if need_test and not data.test:
        raise DataError(
            f"data '{root}': has no test split; evaluation needs good pictures and anomalies, e.g. in test/"
        )
    return data


def hold_out(files: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Splits sorted files into (kept, held out): every fifth is held out, of fewer than ten as many as make two.

    Depends on nothing but order, so that the same folder always gives the same split. Raises DataError under four.
    """
    if len(files) < 4:
        where = files[0].parent if files else "."
        raise DataError(f"data '{where}': {len(files)} pictures cannot be split; give four or more, or validation/good")
    every = min(5, len(files) // 2)
    kept = (file for index, file in enumerate(files, start=1) if index % every)
    return tuple(kept), tuple(files[every - 1 :: every])


def list_images(folder: Path) -> tuple[Path, ...]:
    """The PNG and JPEG files directly in `folder`, sorted by name; raises DataError for none, or other formats."""
    if not folder.is_dir():
        raise DataError(f"data '{folder}': no such folder; expected {_EXPECTED}")
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.suffix.lower() in OTHER_SUFFIXES:
            raise DataError(f"picture '{path}': only PNG and JPEG are read; convert it, or move it elsewhere")
    files = tuple(path for path in entries if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"data '{folder}': holds no PNG or JPEG file")
    return files


def read_image(path: Path) -> Image:
    """Decodes one PNG or JPEG to (h, w, 3) uint8 RGB; grey and palettes become RGB, an opaque alpha is dropped.

    Raises DataError that names the file: damaged, cut, more than 8 bits a channel (a scale would have to be guessed),
    CMYK (its colours need a profile), or transparent somewhere (what lies behind is unknown).
    """
    raw = read_raw(path)
    header = read_header(path, raw)
    if header.bits > 8:
        raise DataError(f"picture '{path}': {header.bits} bits a channel; save all pictures as 8 bits on one scale")
    if header.colour == "cmyk":
        raise DataError(f"picture '{path}': is CMYK; save it as RGB")
    if header.alpha:
        _refuse_transparency(path, decode(path, raw, header, cv2.IMREAD_UNCHANGED))
    decoded = decode(path, raw, header, cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_raw(path: Path) -> bytes:
    """A file's bytes; raises DataError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"picture '{path}': cannot be read ({error.strerror})") from error


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) by the header; raises DataError as `read_header`."""
    header = read_header(path, read_raw(path))
    return header.height, header.width


def decode(path: Path, raw: bytes, header: Header, flags: int) -> NDArray[np.uint8]:
    """OpenCV's decoding under `flags`, orientation tags ignored; raises DataError where it does not fit the header."""
    decoded = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None or decoded.shape[:2] != (header.height, header.width):
        raise DataError(f"picture '{path}': cannot be decoded; is it damaged?")
    return np.asarray(decoded)


def check_pictures(data: DataFolder) -> None:
    """Decodes every picture once, so that the first bad one is named before hours go into training.

    Raises DataError also where a normal is one flat colour, or where all normals of a split are the same picture:
    there would be nothing to learn and no spread to calibrate on. A flat test picture is allowed: a covered lens is
    an anomaly.
    """
    for files in (data.train, data.validation):
        seen = set()
        for path in files:
            image = read_region_of(path, data.region)
            if image.min(axis=(0, 1)).tolist() == image.max(axis=(0, 1)).tolist():
                raise DataError(f"picture '{path}': is one flat colour; remove it, or check the camera that took it")
            seen.add(hashlib.sha256(image.tobytes()).digest())
        if len(seen) == 1:
            raise DataError(f"data '{files[0].parent}': all pictures are the same one; give different good parts")
    for path in (path for files in data.test.values() for path in files):
        read_region_of(path, data.region)


def read_region_of(path: Path, region: RegionOfInterest | None) -> Image:
    """The part of a picture file that a model sees, before the resize; raises DataError as `read_image`, and where the
    picture is of another size than the region is made for."""
    image = read_image(path)
    try:
        return image if region is None else region.cut(image)
    except ValueError as error:
        raise DataError(f"picture '{path}': {error}") from error


def load_at_model_size(files: Sequence[Path], size: int, region: RegionOfInterest | None = None) -> NDArray[np.uint8]:
    """Reads pictures one by one into one (n, size, size, 3) uint8 array."""
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(files):
        images[index] = to_model_size(read_region_of(path, region), size, size)
    return images


def data_sha256(files: Sequence[Path], root: Path, region: RegionOfInterest | None = None) -> str:
    """Hash over the names and bytes of `files`, and the region: says which data a model was fitted on."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    if region is not None:
        digest.update(region.model_dump_json().encode())
    return digest.hexdigest()


def read_header(path: Path, raw: bytes) -> Header:
    """Size and kind of a PNG or JPEG, with its structure checked to the end; decodes no pixel.

    Raises DataError that names the file where it is neither, cut, damaged, or larger than MAX_PIXELS.
    """
    if raw.startswith(_PNG_SIGNATURE):
        header = _png_header(path, raw)
    elif raw.startswith(b"\xff\xd8"):
        header = _jpeg_header(path, raw)
    else:
        raise DataError(f"picture '{path}': is neither PNG nor JPEG (first bytes {raw[:4].hex() or 'missing'})")
    if header.height < 1 or header.width < 1 or header.height * header.width > MAX_PIXELS:
        size = f"{header.width} x {header.height}"
        raise DataError(f"picture '{path}': {size} pixels; at most {MAX_PIXELS} are accepted")
    return header


def _layout(root: Path) -> Layout:
    if (root / "train").is_dir():
        marks = ("validation", "defects_config.json", *(f"test/{TEST_KINDS[k]}" for k in ("logical", "structural")))
        return Layout.LOCO if any((root / mark).exists() for mark in marks) else Layout.MVTEC_AD
    if (root / "good").is_dir() or _has_pictures(root):
        return Layout.FOLDER
    raise DataError(
        f"data '{root}': {'nothing to fit on' if root.is_dir() else 'no such folder'}; expected {_EXPECTED}"
    )


def _open_loco(root: Path) -> DataFolder:
    train, validation = (list_images(root / split / "good") for split in ("train", "validation"))
    test: dict[str, tuple[Path, ...]] = {}
    if (root / "test").is_dir():
        _refuse_others(root / "test", set(TEST_KINDS.values()))
        there = {kind: root / "test" / folder for kind, folder in TEST_KINDS.items()}
        test = {kind: list_images(folder) for kind, folder in there.items() if kind == "good" or folder.is_dir()}
    return DataFolder(root, Layout.LOCO, train, validation, test)


def _open_mvtec_ad(root: Path) -> DataFolder:
    train, validation = hold_out(list_images(root / "train" / "good"))
    test: dict[str, tuple[Path, ...]] = {}
    if (root / "test").is_dir():
        test = {"good": list_images(root / "test" / "good")} | _anomalies(root / "test")
    return DataFolder(root, Layout.MVTEC_AD, train, validation, test)


def _open_folder(root: Path) -> DataFolder:
    good = root / "good" if (root / "good").is_dir() else root
    if good != root and _has_pictures(root):
        raise DataError(f"data '{root}': has pictures beside good/; move them into good/ or into a folder of anomalies")
    for name in ("ground_truth", "test"):
        if (root / name).is_dir():
            raise DataError(f"data '{root / name}': belongs to the MVTec layouts; put the good pictures in train/good")
    train, anomalies, test = list_images(good), _anomalies(root), {}
    if anomalies:
        train, held = hold_out(train)
        test = {"good": held} | anomalies
    train, validation = hold_out(train)
    return DataFolder(root, Layout.FOLDER, train, validation, test)


def _anomalies(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Every picture of the sub-folders other than good/, as structural anomalies."""
    defects = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "good")
    found = tuple(file for defect in defects if not defect.name.startswith(".") for file in list_images(defect))
    return {"structural": found} if found else {}


def _refuse_others(folder: Path, known: set[str]) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in known and not path.name.startswith("."):
            raise DataError(f"data '{path}': is none of {', '.join(sorted(known))}; remove or rename it")


def _has_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


def _refuse_transparency(path: Path, decoded: NDArray[np.uint8]) -> None:
    has_alpha = decoded.ndim == 3 and decoded.shape[2] in (2, 4)
    if has_alpha and int(decoded[..., -1].min()) < 255:
        raise DataError(f"picture '{path}': is transparent in places; save it without an alpha channel")


def _png_header(path: Path, raw: bytes) -> Header:
    header: Header | None = None
    alpha = False
    for kind, body in _png_chunks(path, raw):
        if kind == b"IHDR" and len(body) == 13:
            width, height, bits, colour = struct.unpack(">IIBB", body[:10])
            name = {0: "grey", 3: "palette", 4: "grey"}.get(colour, "rgb")
            header = Header(height, width, bits, name, alpha=colour in (4, 6))
        alpha = alpha or kind == b"tRNS"
        if kind == b"IEND" and header is not None:
            return replace(header, alpha=header.alpha or alpha)
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


def _jpeg_header(path: Path, raw: bytes) -> Header:
    if b"\xff\xd9" not in raw[-64:]:  # some cameras pad after the end marker
        raise DataError(f"picture '{path}': the JPEG is cut: its end marker is missing")
    at = 2
    while at + 10 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker in _JPEG_FRAMES:
            bits, height, width, channels = struct.unpack(">BHHB", raw[at + 4 : at + 10])
            return Header(height, width, bits, {1: "grey", 3: "rgb"}.get(channels, "cmyk"), alpha=False)
        at += 1 if marker == 0xFF else 2 + length
    raise DataError(f"picture '{path}': the JPEG has no frame header")
