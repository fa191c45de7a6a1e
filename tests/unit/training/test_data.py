"""Pictures: what is read, what is refused, and that the line resizes as training does."""

import ast
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PilImage

from training.data import (
    Layout,
    check_pictures,
    data_sha256,
    hold_out,
    list_images,
    open_data,
    read_image,
    to_model_size,
)
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


def test_folder_without_pictures_says_what_is_expected(tmp_path):
    """The error shows what would be found."""
    with pytest.raises(DataError, match="train/good"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_data(tmp_path / "none")


def fill(root: Path, amounts: dict[str, int]) -> Path:
    """Numbered pictures in sub-folders, no two alike."""
    for folder, count in amounts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write(root / folder / f"{index:03d}.png", np.roll(picture((8, 9, 3)), index + 1))
    return root


LOCO = {"train/good": 4, "validation/good": 3, "test/good": 2, "test/logical_anomalies": 1}
LOCO_WHOLE = LOCO | {"test/structural_anomalies": 2}
MVTEC_AD = {"train/good": 11, "test/good": 2, "test/scratch": 2, "test/bent": 1}


@pytest.mark.parametrize(
    ("amounts", "layout", "counts"),
    [
        (LOCO_WHOLE, Layout.LOCO, {"good": 2, "logical": 1, "structural": 2}),
        (LOCO, Layout.LOCO, {"good": 2, "logical": 1}),
        ({"train/good": 2, "validation/good": 2}, Layout.LOCO, {}),
        (MVTEC_AD, Layout.MVTEC_AD, {"good": 2, "structural": 3}),
        ({"train/good": 4}, Layout.MVTEC_AD, {}),
        ({"good": 10}, Layout.FOLDER, {}),
        ({".": 4}, Layout.FOLDER, {}),
        ({"good": 12, "bad": 2, "odd": 1}, Layout.FOLDER, {"good": 2, "structural": 3}),
        ({".": 12, "bad": 2}, Layout.FOLDER, {"good": 2, "structural": 2}),
    ],
)
def test_layout_is_recognised(tmp_path, amounts, layout, counts):
    """The folders say which layout it is; no picture is in two splits."""
    data = open_data(fill(tmp_path, amounts))
    assert data.layout is layout
    assert {kind: len(files) for kind, files in data.test.items()} == counts
    every = [*data.train, *data.validation, *(f for files in data.test.values() for f in files)]
    assert len(every) == len(set(every)) == sum(amounts.values())
    assert min(len(data.train), len(data.validation)) >= 2


def test_held_out_pictures_are_always_the_same():
    """Every fifth; of fewer than ten as many as make two; under four there is nothing to split."""
    files = [Path(f"{index:02d}.png") for index in range(13)]
    assert [path.stem for path in hold_out(files)[1]] == ["04", "09"]
    assert [path.stem for path in hold_out(files[:5])[1]] == ["01", "03"]
    assert hold_out(files[:4]) == ((files[0], files[2]), (files[1], files[3]))
    with pytest.raises(DataError, match="four or more"):
        hold_out(files[:3])


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"train/good": 1, "validation/good": 2}, "needs two pictures"),
        ({"train/good": 2, "validation/good": 1}, "needs two pictures"),
        ({"train/good": 1}, "cannot be split"),
        ({"good": 1}, "cannot be split"),
        ({"train/good": 4, "test/logical_anomalies": 1}, r"validation/good.*no such folder"),
        ({"train/good": 4, "validation/good": 2, "test/structural_anomalies": 1}, r"test/good.*no such folder"),
        (LOCO | {"test/scratch": 1}, r"test/scratch.*remove or rename"),
        ({"train/good": 4, "test/good": 2}, "no anomalies"),
        ({"good": 9, ".": 1}, "beside good/"),
        ({"good": 9, "ground_truth": 1}, r"ground_truth.*MVTec"),
        ({"good": 9, "bad": 0}, r"bad.*no PNG"),
    ],
)
def test_unfit_folder_is_refused(tmp_path, amounts, message):
    """What is missing, too small or ambiguous is named with its folder."""
    with pytest.raises(DataError, match=message):
        open_data(fill(tmp_path, amounts))


def test_evaluation_needs_a_test_split(tmp_path):
    with pytest.raises(DataError, match="no test split"):
        open_data(fill(tmp_path, {"good": 8}), need_test=True)


def test_16_bits_are_refused_with_the_remedy(tmp_path):
    """Whatever scale were guessed, another camera's pictures would not share it."""
    path = write(tmp_path / "deep.png", picture((8, 9)).astype(np.uint16) * 257)
    with pytest.raises(DataError, match=r"deep\.png.*16 bits.*8 bits"):
        read_image(path)


def test_cmyk_is_refused_with_the_remedy(tmp_path):
    """OpenCV would convert it without a profile."""
    path = tmp_path / "print.jpg"
    PilImage.fromarray(picture((16, 16, 4)), mode="CMYK").save(path)
    with pytest.raises(DataError, match=r"print\.jpg.*CMYK.*RGB"):
        read_image(path)


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
    """Some tools write an alpha that says nothing; a real one hides what the line would see."""
    content = np.dstack([picture((8, 9, 3)), np.full((8, 9), 255, dtype=np.uint8)])
    assert np.array_equal(read_image(write(tmp_path / "a.png", content)), content[..., 2::-1])
    content[3, 4, 3] = 254
    with pytest.raises(DataError, match=r"b\.png.*transparent"):
        read_image(write(tmp_path / "b.png", content))


def test_transparent_palette_is_refused(tmp_path):
    """A palette hides its transparency in a chunk of its own."""
    for name, options in (("opaque.png", {}), ("clear.png", {"transparency": 0})):
        PilImage.fromarray(np.zeros((8, 9), dtype=np.uint8), mode="L").convert("P").save(tmp_path / name, **options)
    assert read_image(tmp_path / "opaque.png").shape == (8, 9, 3)
    with pytest.raises(DataError, match=r"clear\.png.*transparent"):
        read_image(tmp_path / "clear.png")


def test_flat_normal_is_refused_and_flat_anomaly_is_not(tmp_path):
    """A covered lens is an anomaly, and no part to learn from."""
    data = open_data(fill(tmp_path, LOCO_WHOLE))
    flat = np.full((8, 9, 3), (1, 2, 3), dtype=np.uint8)
    write(data.test["logical"][0], flat)
    check_pictures(data)
    write(data.validation[1], flat)
    with pytest.raises(DataError, match=r"validation/good/001\.png.*flat"):
        check_pictures(data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_copies_of_one_picture_are_refused(tmp_path, split):
    data = open_data(fill(tmp_path, LOCO_WHOLE))
    for path in getattr(data, split):
        write(path, picture((8, 9, 3)))
    with pytest.raises(DataError, match=f"{split}/good.*the same one"):
        check_pictures(data)


def test_bad_test_picture_is_found(tmp_path):
    data = open_data(fill(tmp_path, LOCO_WHOLE))
    data.test["structural"][1].write_bytes(b"")
    with pytest.raises(DataError, match=r"structural_anomalies/001\.png"):
        check_pictures(data)


def test_other_files_are_ignored(tmp_path):
    """Only pictures count, in the order of their names, whatever the case of the suffix."""
    for name in ("b.PNG", "a.jpeg", "notes.txt", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG"]


def test_a_picture_of_another_format_is_refused_by_name(tmp_path):
    for name in ("a.png", "b.tiff"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.tiff': only PNG and JPEG are read"):
        list_images(tmp_path)


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
