"""Pictures from disk: what is read, and what a bad file costs."""

import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import FrameError, SourceError
from pipeline.sources.files import FolderSource, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def png_claiming(width, height, *, depth=8, colour=2, data=None):
    """Give a valid little PNG whose header claims a size that its few bytes of data do not have."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"\0" * 100) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(path, pixels=PIXELS, mode=None, **options):
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["png", "bmp", "tif"])
def test_a_lossless_picture_is_read_as_it_is(tmp_path, kind):
    """A picture is HWC uint8 RGB, pixel by pixel as saved."""
    assert np.array_equal(read_picture(saved(tmp_path / f"p.{kind}")), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA"])
def test_grey_and_palette_become_rgb(tmp_path, mode):
    """Every 8-bit kind of picture comes as RGB."""
    image = read_picture(saved(tmp_path / "p.png", mode=mode))
    assert (image.shape, image.dtype) == (PIXELS.shape, np.uint8)


def test_a_noted_orientation_is_not_applied(tmp_path):
    """Pixels come as they are stored, as the training room reads them (tests/contract/test_region.py)."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    saved(tmp_path / "p.jpg", exif=exif)
    assert read_picture(tmp_path / "p.jpg").shape == (48, 64, 3)


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp", "tif"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_a_cut_picture_is_an_error_that_names_it(tmp_path, kind, part):
    """A picture that ends too early, down to no byte at all, is a FrameError with its name, never half-grey."""
    path = saved(tmp_path / f"cut.{kind}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(FrameError, match=f"^cut.{kind}: "):
        read_picture(path)


@pytest.mark.parametrize("side", [9_000, 12_000, 100_000])
def test_a_picture_bomb_is_refused_by_its_header(tmp_path, side):
    """A hundred bytes that claim gigapixels are refused before a pixel is allocated."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match=r"bomb\.png: .*limit of 64000000 pixels"):
            read_picture(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.errors import FrameError
from pipeline.sources.files import FolderSource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = []
with FolderSource(Path(sys.argv[1])) as source:
    while True:
        try:
            if source.read() is None:
                break
        except FrameError as error:
            told.append(error.part_id)
print(*told, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_folder_of_huge_and_empty_pictures_costs_no_memory(tmp_path):
    """Whole pictures of 10 000 x 10 000 (300 MB each as RGB) and empty files: each named, under 20 MB more in use."""
    side = 10_000
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(b"\0" * (3 * side + 1)) for _ in range(side)) + packer.flush()
    (tmp_path / "whole.png").write_bytes(png_claiming(side, side, data=rows))
    header = struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 54 + 3 * side**2, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0
    )
    with (tmp_path / "whole.bmp").open("wb") as file:
        file.write(header)
        file.truncate(54 + 3 * side**2)  # a hole on the disk
    for name in ("empty.png", "empty.jpg", "empty.tif", "empty.webp", "empty.bmp"):
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    *told, grown_mb = done.stdout.split()
    assert told == sorted(path.name for path in tmp_path.iterdir())
    assert int(grown_mb) < 20


def test_a_text_bomb_is_refused(tmp_path):
    """A PNG whose compressed comment unpacks to a hundred megabytes is refused, not unpacked."""
    comment = b"zTXt" + b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)
    whole = saved(tmp_path / "p.png").read_bytes()
    chunk = struct.pack(">I", len(comment) - 4) + comment + struct.pack(">I", zlib.crc32(comment))
    path = tmp_path / "text.png"
    path.write_bytes(whole[:33] + chunk + whole[33:])
    with pytest.raises(FrameError, match=r"text\.png"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "F"])
def test_other_pixel_formats_are_refused_by_name(tmp_path, mode):
    """16-bit, CMYK and float pictures are refused: squeezed into 8 bits they would not be what the model knows."""
    if mode == "CMYK":
        path = saved(tmp_path / "p.jpg", mode="CMYK")
    else:
        pixels = PIXELS[..., 0].astype(np.uint16 if mode == "I;16" else np.float32)
        path = saved(tmp_path / "p.tif", pixels)
    with pytest.raises(FrameError, match=f"{path.name}: pixel format {mode}"):
        read_picture(path)


def test_16_bit_colour_is_refused(tmp_path):
    """A colour PNG of 16 bits is refused as a grey one is, not read as its upper bytes."""
    path = tmp_path / "deep.png"
    path.write_bytes(png_claiming(2, 2, depth=16))
    with pytest.raises(FrameError, match=r"deep\.png: pixel format"):
        read_picture(path)


@pytest.mark.parametrize("content", [b"hello", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_said_so(tmp_path, content):
    """A file with a picture's name and other content is a FrameError."""
    path = tmp_path / "p.png"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=r"^p\.png: "):
        read_picture(path)


def test_a_program_in_a_pictures_name_is_not_run(tmp_path):
    """PostScript named .png is no picture: no interpreter is called for a file of the line."""
    saved(tmp_path / "p.eps")
    (tmp_path / "p.eps").rename(tmp_path / "p.png")
    with pytest.raises(FrameError, match="not a picture"):
        read_picture(tmp_path / "p.png")


def drain(source):
    """Read a source to its end; gives part ids, faults as `!` and the part id."""
    found = []
    while True:
        try:
            picture = source.read()
        except FrameError as error:
            found.append("!" + str(error.part_id))
            continue
        if picture is None:
            return found
        found.append(picture.part_id)


def test_a_folder_is_read_in_order_past_its_bad_files(tmp_path):
    """Pictures come in the order of their names, subfolders included; a bad one keeps its part id."""
    for name in ("b.png", "a.jpg", "sub/c.PNG", "d.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "e.png").mkdir()
    with FolderSource(tmp_path) as source:
        assert drain(source) == ["a.jpg", "!b.png", "d.bmp", "!e.png", "sub/c.PNG"]
        assert source.read() is None


def test_a_name_that_is_not_unicode_gives_a_part_id_that_can_be_told(tmp_path):
    """The part id is text that fits into an event, whatever bytes the file's name holds."""
    os.rename(os.fsencode(saved(tmp_path / "p.png")), os.fsencode(tmp_path) + b"/p\xff.png")  # noqa: PTH104 (bytes)
    with FolderSource(tmp_path) as source:
        picture = source.read()
    assert picture is not None
    assert picture.part_id.encode("utf-8")


@pytest.mark.parametrize(("name", "reason"), [("absent", "not_found"), ("empty", "no_frames")])
def test_a_folder_without_pictures_is_final(tmp_path, name, reason):
    """A folder that is not there, or holds no picture, is named, and not tried again."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=name) as caught:
        FolderSource(tmp_path / name).__enter__()
    assert (caught.value.reason, caught.value.final) == (reason, True)
