"""Video through FFmpeg: part ids from SEI messages, and what a cut or damaged stream costs."""

from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.errors import FrameError, SourceError
from pipeline.sources import stream
from pipeline.sources.sei import PART_ID_UUID
from pipeline.sources.stream import StreamSource


def sei(message):
    """Give an unregistered SEI message as an H.264 NAL unit (Annex B, with emulation prevention)."""
    body = b"\x06\x05" + b"\xff" * (len(message) // 255) + bytes([len(message) % 255]) + message + b"\x80"
    escaped, zeros = bytearray(), 0
    for byte in body:
        if zeros >= 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + bytes(escaped)


def h264(messages, *, width=64, height=48, key_every=250):
    """Encode one frame a message, which goes before it; None stands for a frame without one. Gives access units."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, 5), Fraction(5), key_every
    encoder.options = {"tune": "zerolatency", "preset": "veryfast", "crf": "18", "sc_threshold": "0"}
    noise = np.random.default_rng(0)
    units = []
    for index, message in enumerate(messages):
        pixels = np.full((height, width, 3), 10 * index % 250, np.uint8)
        pixels[:20, :20] = noise.integers(0, 255, (20, 20, 3))
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = index
        units += [(b"" if message is None else sei(message)) + bytes(packet) for packet in encoder.encode(frame)]
    return units


def ids(count, prefix="p"):
    return [PART_ID_UUID.bytes + f"{prefix}-{number}".encode() for number in range(count)]


@pytest.fixture
def read(tmp_path):
    """Read a stream's bytes to their end; gives part ids, `!` and the part id (or None) for a damaged frame."""

    def run(raw, name="x.h264"):
        path = tmp_path / name
        path.write_bytes(raw)
        found = []
        with StreamSource(str(path), shown=name, timeouts_s=(5.0, 5.0), options={}) as source:
            while True:
                try:
                    picture = source.read()
                except FrameError as error:
                    found.append(f"!{error.part_id}")
                    continue
                if picture is None:
                    return found
                found.append(picture.part_id)

    return run


def test_each_frame_carries_its_own_part_id(read):
    """The part id of a frame's SEI message is the picture's, in order, none lost."""
    assert read(b"".join(h264(ids(12)))) == [f"p-{number}" for number in range(12)]


def test_a_picture_is_rgb_of_the_cameras_size(tmp_path):
    """A picture is HWC uint8 RGB at the camera's size, stamped before it was decoded, with where its id came from."""
    path = tmp_path / "x.h264"
    path.write_bytes(b"".join(h264(ids(1), width=128, height=96)))
    with StreamSource(str(path), shown="x", timeouts_s=(5.0, 5.0), options={}) as source:
        picture = source.read()
    assert picture is not None
    assert (picture.image.shape, picture.image.dtype, picture.part_id_source) == ((96, 128, 3), np.uint8, "sei")
    assert abs(int(picture.image[60:, 60:].mean())) < 12  # the first frame is black but for its corner


@pytest.mark.parametrize(
    ("message", "part_id"),
    [
        (PART_ID_UUID.bytes + "Gehäuse-7".encode(), "Gehäuse-7"),
        (PART_ID_UUID.bytes + b"p-1\0", "p-1"),
        (PART_ID_UUID.bytes + b"\0\0\1x", None),
        (PART_ID_UUID.bytes, None),
        (PART_ID_UUID.bytes + b"two\nlines", None),
        (PART_ID_UUID.bytes + b"x" * 129, None),
        (PART_ID_UUID.bytes + b"p\xff\xfe", None),
        (bytes(16) + b"somebody else's", None),
        (b"short", None),
        (None, None),
    ],
    ids=["text", "padded", "start-code", "empty", "two-lines", "long", "not-utf-8", "foreign", "short", "none"],
)
def test_what_is_no_part_id_is_none(read, message, part_id):
    """A message that is foreign, empty, too long, unprintable or not UTF-8 gives no part id, and the picture stays."""
    assert read(b"".join(h264([message]))) == [part_id]


def test_several_messages_do_not_hide_the_part_id(read):
    """An encoder's own SEI message before and after ours changes nothing."""
    (unit,) = h264(ids(1))
    foreign = sei(bytes(range(16)) + b"x264 settings")
    assert read(foreign + unit) == ["p-0"]
    (bare,) = h264([None])
    assert read(sei(ids(1)[0]) + foreign + bare) == ["p-0"]


def test_a_truncated_stream_loses_no_part_silently(read):
    """A stream cut inside its last frame gives every whole frame, and the cut one as a fault with its part id."""
    units = h264(ids(12))
    assert read(b"".join(units)[:-40]) == [f"p-{number}" for number in range(11)] + ["!p-11"]


def test_after_a_damaged_frame_none_counts_until_a_key_frame(read):
    """Frames built upon a damaged one are faults too; the next key frame is good again, and no part goes missing."""
    units = h264(ids(12), key_every=8)
    damaged = bytearray(units[4])
    damaged[90:115] = b"\xff" * 25
    found = read(b"".join([*units[:4], bytes(damaged), *units[5:]]))
    assert found == [f"{'!' if 4 <= number < 8 else ''}p-{number}" for number in range(12)]


def test_frames_before_the_first_key_frame_are_not_lost_in_silence(read, tmp_path):
    """A stream that is joined between two key frames begins with some that show nothing: each is told, with its id."""
    stamped, bare = h264(ids(12), key_every=8), h264([None] * 12, key_every=8)
    assert read(b"".join(stamped[3:])) == [f"{'!' if number < 8 else ''}p-{number}" for number in range(3, 12)]
    path = tmp_path / "bare.h264"
    path.write_bytes(b"".join(bare[3:]))
    reasons = []
    with StreamSource(str(path), shown="x", timeouts_s=(5.0, 5.0), options={}) as source:
        for _ in range(5):
            with pytest.raises(FrameError) as caught:
                source.read()
            reasons.append((caught.value.reason, caught.value.part_id))
        assert source.read() is not None
    assert reasons == [("no_key_frame", None)] * 5


def test_a_camera_that_changes_its_size_goes_on(read):
    """New parameter sets in the stream are followed: pictures of the new size come with their part ids."""
    assert read(b"".join(h264(ids(2)) + h264(ids(2, "q"), width=128, height=96))) == ["p-0", "p-1", "q-0", "q-1"]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("zero.h264", b""),
        ("zero.mp4", b""),
        ("text.mp4", b"this is no video"),
        ("header.mp4", b"\0\0\0\x18ftypmp42" + bytes(12)),
    ],
)
def test_a_file_without_a_picture_is_an_error(read, name, raw):
    """An empty or foreign file is a final SourceError with its name, not a camera that ended well."""
    with pytest.raises(SourceError, match=name) as caught:
        read(raw, name)
    assert not isinstance(caught.value, FrameError)
    assert caught.value.final


def test_a_missing_file_is_named(tmp_path):
    """A video that is not there is final and named."""
    path = tmp_path / "absent.mp4"
    with pytest.raises(SourceError, match=r"absent\.mp4") as caught:
        StreamSource(str(path), shown=str(path), timeouts_s=(1.0, 1.0), options={}).__enter__()
    assert (caught.value.reason, caught.value.final) == ("not_found", True)


def test_a_file_with_sound_only_is_refused(tmp_path):
    """A file without a video stream is a final SourceError."""
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
    with pytest.raises(SourceError, match="no video stream") as caught:
        StreamSource(str(path), shown=str(path), timeouts_s=(1.0, 1.0), options={}).__enter__()
    assert caught.value.final


def test_a_stream_of_giant_pictures_is_refused(read, monkeypatch):
    """A stream over the pixel limit ends the camera before a picture is decoded."""
    monkeypatch.setattr(stream, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(SourceError, match="pixels") as caught:
        read(b"".join(h264(ids(1))))
    assert (caught.value.reason, caught.value.final) == ("too_large", True)


def test_an_unreachable_camera_is_not_final_and_keeps_its_password():
    """A camera that refuses is tried again, and its message never holds the address with the password."""
    address = "rtsp://eve:s3cret@127.0.0.1:9/c1"
    source = StreamSource(address, shown="rtsp://127.0.0.1:9/c1", timeouts_s=(1.0, 1.0), options={})
    with pytest.raises(SourceError, match=r"rtsp://127\.0\.0\.1:9/c1") as caught:
        source.__enter__()
    assert (caught.value.reason, caught.value.final) == ("unreachable", False)
    assert "s3cret" not in str(caught.value) + caught.value.hint
    assert "address" in caught.value.hint
