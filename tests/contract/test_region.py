"""The region of interest stands in two rooms, which cannot import each other: a model is shown what it was fitted on.

Compared are the model's inputs, bit for bit, which is stronger than scores: the network is the same, and so are they.
"""

from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import region as line
from pipeline.cameras import FolderCamera, VideoCamera
from pipeline.health import Health
from pipeline.ingest import CameraReader, Handover
from pipeline.metrics import Metrics
from training import data as model_room
from training import region as training

SIZE = (96, 72)
MODEL_SIZE = 64
REGIONS = [
    None,
    {"crop": [10, 5, 60, 40]},
    {"rotate": 90},
    {"crop": [30, 20, 50, 40], "rotate": 7.5},
    {"crop": [0, 0, 40, 72], "rotate": -100.0, "mask": [[[5, 5], [90, 8], [50, 70]], [[0, 60], [20, 60], [10, 71]]]},
    {"mask": "mask.png"},
]


@st.composite
def cases(draw):
    """A picture's size and a region in it."""
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    crop = [x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y))]
    rotate = draw(st.one_of(st.sampled_from([0, 45, 90, 135, 180, 270, -90, 360]), st.floats(-360, 360)))
    mask = draw(st.one_of(st.none(), st.just("drawn")))
    if mask is not None:
        mask = [[[draw(st.floats(0, width)), draw(st.floats(0, height))] for _ in range(3)], [[x, y], [x, y], [x, y]]]
    return {"picture_size": [width, height], "crop": crop, "rotate": rotate, "mask": mask}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(cases(), st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_both_rooms_cut_the_same(document, seed, u, v):
    """Over random pictures and regions: the same pixels, and the same place for a place of the cut."""
    width, height = document["picture_size"]
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = line.RegionOfInterest(**document)
    theirs = training.RegionOfInterest(**document)
    assert ours.model_dump() == theirs.model_dump()
    cut = line.cut_region(image, ours.view.crop, ours.rotate, ours.inside())
    assert np.array_equal(cut, theirs.cut(image))
    assert cut.shape[1::-1] == line.upright_size(ours.view)
    assert line.in_picture(u, v, ours.rectangle, ours.rotate) == training.in_picture(
        u, v, theirs.rectangle, theirs.rotate
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": [50, 0, 50, 20]}, "outside of the picture of 96 x 72"),
        ({"crop": [0, 0, 0, 20]}, "0 x 20"),
        ({"crop": [-1, 0, 5, 5]}, "greater than or equal to 0"),
        ({"crop": [1, 2, 3]}, "at least 4 items"),
        ({"rotate": float("nan")}, "finite number"),
        ({"mask": [[[0, 0], [5, 5]]]}, "at least 3 items"),
        ({"mask": [[[0, 0], [97, 5], [5, 9]]]}, "corner outside"),
        ({"crop": [50, 50, 10, 10], "mask": [[[0, 0], [5, 0], [0, 5]]]}, "nothing of the crop"),
        ({"mask": line.DATA_URL + "??"}, "not base64"),
        ({"mask": line.DATA_URL + "AAAA"}, "no whole PNG"),
        ({"picture_size": [32_000, 32_000], "mask": [[[0, 0], [32_000, 0], [0, 32_000]]]}, "over 64000000 pixels"),
        ({"croop": [0, 0, 1, 1]}, "Extra inputs"),
    ],
)
def test_both_rooms_refuse_the_same(change, message):
    """A region that makes no sense is refused where it is set, for the same reason."""
    document = {"picture_size": list(SIZE)} | change
    for room in (line, training):
        with pytest.raises(ValueError, match=message):
            room.RegionOfInterest(**document)


def save_mask(path, size=SIZE, mode="L"):
    """A mask that shows a disc, and a corner that is darker than half."""
    drawn = cv2.circle(np.zeros(size[::-1], np.uint8), (40, 30), 25, 255, -1)
    drawn[:4, :4] = 127
    Image.fromarray(drawn).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_mask_file_means_the_same_in_both_rooms(tmp_path, mode):
    """Black and white of every kind becomes the same mask, and lies in the settings themselves from then on."""
    save_mask(tmp_path / "mask.png", mode=mode)
    document = {"picture_size": list(SIZE), "mask": "mask.png"}
    ours, theirs = (room.with_mask_read(room.RegionOfInterest(**document), tmp_path) for room in (line, training))
    (tmp_path / "mask.png").unlink()
    assert ours.mask == theirs.mask
    inside = ours.inside()
    assert np.array_equal(inside, theirs.inside())
    assert (inside[30, 40], inside[71, 95]) == (255, 0)
    assert set(np.unique(inside)) == {0, 255}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: save_mask(path, (72, 96)), "is 72 x 96"),
        (lambda path: save_mask(path, mode="LA"), "transparency"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "no whole PNG"),
        (lambda path: path.write_bytes(path.read_bytes()[:60] + bytes(20) + path.read_bytes()[80:]), "no whole PNG"),
        (lambda path: path.write_bytes(b"GIF89a" + bytes(90)), "no whole PNG"),
        (lambda path: Image.new("L", SIZE).save(path), "nothing of the crop"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(600_000)), "bytes, at most"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path, spoil, message):
    """Both rooms name the file and the fault before anything runs."""
    path = tmp_path / "mask.png"
    save_mask(path)
    spoil(path)
    document = {"picture_size": list(SIZE), "mask": "mask.png"}
    for room in (line, training):
        with pytest.raises(ValueError, match=rf"mask.png.*({message})"):
            room.with_mask_read(room.RegionOfInterest(**document), tmp_path)


def frames_of(camera):
    """Read a finite camera to its end with the line's own reader; gives its frames."""
    frames = []
    metrics = Metrics()
    metrics.camera(camera.id, product=camera.product, station=camera.station)
    handover = Handover(
        accept=frames.append,
        answer=lambda _: None,
        wait_for_room=lambda *_: True,
        announce=lambda *_: None,
        metrics=metrics,
        health=Health(),
        run="run1",
        budget_s=2.0,
    )
    reader = CameraReader(camera, (MODEL_SIZE, MODEL_SIZE), handover)
    reader.start()
    assert reader.join(30.0)
    return frames


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures as PNG, one a second time as a JPEG with an orientation tag, and all PNG as a lossless video."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "folder").mkdir()
    generator = np.random.default_rng(4)
    images = [generator.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8) for _ in range(5)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / "folder" / f"{number}.png")
    with av.open(str(root / "video.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = *SIZE, "bgr0"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    save_mask(root / "mask.png")
    return root


@pytest.mark.parametrize("given_region", REGIONS, ids=str)
def test_a_picture_is_the_same_input_by_every_way(pictures, given_region):
    """Folder, lossless video and the training room give the model the same bytes, with and without a region."""
    ours = theirs = None
    if given_region is not None:
        document = {"picture_size": list(SIZE)} | given_region
        (pictures / "region.yaml").write_text(yaml.safe_dump(document))
        theirs = training.read_region(pictures / "region.yaml")
        ours = line.with_mask_read(line.RegionOfInterest(**document), pictures)
    files = sorted((pictures / "folder").iterdir())
    trained = model_room.load_at_model_size(files, MODEL_SIZE, theirs)
    common = {"id": "c1", "product": "tray", "region": ours}
    for camera in (
        FolderCamera(type="folder", path=pictures / "folder", **common),
        VideoCamera(type="video", path=pictures / "video.mkv", **common),
    ):
        frames = frames_of(camera)
        assert [frame.cause for frame in frames] == [None] * len(files)
        assert np.array_equal(np.stack([frame.image for frame in frames]), trained)


def test_an_orientation_tag_means_the_same_in_both_rooms(tmp_path):
    """A picture that a phone calls sideways is read as it is stored by both, to the decoder's rounding."""
    tag = Image.Exif()
    tag[0x0112] = 6
    ramp = np.broadcast_to(np.linspace(0, 255, SIZE[0], dtype=np.uint8)[None, :, None], (*SIZE[::-1], 3))
    for kind in ("jpg", "png"):
        folder = tmp_path / kind
        folder.mkdir()
        Image.fromarray(np.ascontiguousarray(ramp)).save(folder / f"p.{kind}", exif=tag)
        (frame,) = frames_of(FolderCamera(id="c1", type="folder", product="tray", path=folder))
        trained = model_room.load_at_model_size([folder / f"p.{kind}"], MODEL_SIZE)[0]
        assert np.abs(frame.image.astype(int) - trained).max() <= (0 if kind == "png" else 1)


def test_a_frame_of_another_size_is_corrupt(pictures):
    """Only a frame can tell that the camera was set to another size: it has a cause, and is not cut elsewhere."""
    region = line.RegionOfInterest(picture_size=[72, 96], crop=[0, 0, 20, 20])
    camera = FolderCamera(id="c1", type="folder", product="tray", path=pictures / "folder", region=region)
    assert {(frame.image is None, frame.cause) for frame in frames_of(camera)} == {(True, "frame_corrupt")}
    with pytest.raises(model_room.DataError, match=r"0\.png.*is 96 x 72, the region is made for 72 x 96"):
        model_room.load_at_model_size(
            [pictures / "folder/0.png"], MODEL_SIZE, training.RegionOfInterest(**region.model_dump())
        )
