"""Pictures: what is read, what is refused, and that the line resizes as training does."""

import ast
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from training.data import data_sha256, list_images, open_loco, read_image, to_model_size
from training.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


def picture(shape: tuple[int, ...] = (30, 40, 3)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, size=shape, dtype=np.uint8)


def write(path: Path, content: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), content)
    return path


def png_header(width: int, height: int) -> bytes:
    """A whole PNG by its chunks, without pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_png_is_read_as_rgb(tmp_path):
    """Colours come out in the order red, green, blue, bit for bit."""
    content = picture()
    assert np.array_equal(read_image(write(tmp_path / "a.png", content)), content[..., ::-1])


def test_jpeg_is_read(tmp_path):
    """A JPEG of a flat colour keeps it within the codec's rounding."""
    flat = np.full((32, 48, 3), (10, 120, 200), dtype=np.uint8)
    read = read_image(write(tmp_path / "a.jpg", flat))
    assert read.shape == (32, 48, 3)
    assert np.abs(read.astype(int) - (200, 120, 10)).max() <= 3


def test_grey_becomes_rgb(tmp_path):
    """A grey picture has three equal channels."""
    grey = picture((20, 25))
    read = read_image(write(tmp_path / "a.png", grey))
    assert all(np.array_equal(read[..., channel], grey) for channel in range(3))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.995])
def test_cut_file_is_refused_by_name(tmp_path, suffix, share):
    """OpenCV would decode a cut JPEG to a grey half; here it is an error that names the file."""
    path = write(tmp_path / f"cut{suffix}", picture((200, 300, 3)))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=f"cut{suffix}.*cut"):
        read_image(path)


def test_damaged_png_is_refused(tmp_path):
    """One flipped byte in the pixels fails the chunk's checksum."""
    path = write(tmp_path / "bad.png", picture())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"bad\.png.*checksum"):
        read_image(path)


def test_picture_bomb_is_refused_before_decoding(tmp_path):
    """The header alone decides: this file would unpack to 30 GB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(100_000, 100_000))
    with pytest.raises(DataError, match=r"bomb\.png.*100000 x 100000"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xd9", b"\xff\xd8" + b"\x00" * 50 + b"\xff\xd9"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    """Empty files, other formats and headerless JPEGs are errors that name the file."""
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.png"):
        read_image(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.png.*cannot be read"):
        read_image(tmp_path / "none.png")


def test_missing_split_is_named(tmp_path):
    """The error shows the folder that was looked for."""
    with pytest.raises(DataError, match="train/good"):
        open_loco(tmp_path)


def test_one_training_picture_is_refused(tmp_path):
    """One picture has no spread."""
    for split in ("train/good", "validation/good"):
        (tmp_path / split).mkdir(parents=True)
        write(tmp_path / split / "000.png", picture())
    with pytest.raises(DataError, match="needs two pictures"):
        open_loco(tmp_path)


def test_other_files_are_ignored(tmp_path):
    """Only pictures count, in the order of their names, whatever the case of the suffix."""
    for name in ("b.PNG", "a.jpeg", "notes.txt", "c.tiff"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG"]


def test_data_hash_sees_names_and_bytes(loco):
    """Another order of bytes under the same names is other data."""
    files = list_images(loco / "train/good")
    assert data_sha256(files, loco) == data_sha256(files, loco) != data_sha256(files[1:], loco)


def test_to_model_size_is_the_area_mean():
    """Halving averages blocks of 2 x 2, the definition of 'resize-area-v1'."""
    content = picture((64, 128, 3))
    blocks = content.reshape(32, 2, 64, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(to_model_size(content, 32, 64).astype(float) - blocks).max() <= 0.5


@pytest.mark.parametrize("shape", [(480, 640, 3), (1000, 1700, 3), (100, 90, 3), (256, 256, 3)])
def test_the_line_resizes_as_training_does(shape):
    """pipeline/ingest.py holds the same lines; the line's own environment is not needed to run them."""
    module = ast.parse((ROOT / "pipeline/ingest.py").read_text(encoding="utf-8"))
    function = next(n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "to_model_size")
    space: dict = {"cv2": cv2, "np": np, "Image": np.ndarray}
    exec(compile(ast.Module([function], []), "ingest.py", "exec"), space)  # noqa: S102 - our own source
    content = picture(shape)
    assert np.array_equal(space["to_model_size"](content, 256, 256), to_model_size(content, 256, 256))
