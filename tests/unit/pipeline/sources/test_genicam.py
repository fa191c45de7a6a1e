"""A sensor's pixels as RGB, and the half of the line's protocol that another Python has to hold."""

import ast
import importlib.util
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from pipeline.sources import link
from pipeline.sources.forkserver import GENICAM_CHILD
from pipeline.sources.genicam import to_rgb

COLOUR = (200, 120, 40)


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
def test_a_bayer_pattern_is_named_by_its_upper_left_pixels(pattern):
    """`BayerRG8` has red in its corner and green beside it: a plain colour comes back as itself."""
    corner = {"RG": ["RG", "GB"], "GR": ["GR", "BG"], "GB": ["GB", "RG"], "BG": ["BG", "GR"]}[pattern]
    values = dict(zip("RGB", COLOUR, strict=True))
    tile = np.array([[values[letter] for letter in row] for row in corner], np.uint8)
    rgb = to_rgb(np.tile(tile, (8, 8)), f"Bayer{pattern}8")
    assert rgb.shape == (16, 16, 3)
    assert np.all(rgb == COLOUR)


def test_grey_is_the_same_in_all_channels():
    """`Mono8` becomes three equal channels, `RGB8` stays as it is."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.all(to_rgb(grey, "Mono8") == grey[..., None])
    colour = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert to_rgb(colour, "RGB8") is colour


def test_both_pythons_mean_the_same_slots():
    """The program for the distribution's Python repeats the protocol's numbers, and imports nothing of ours."""
    theirs, ours = (ast.parse(Path(path).read_text()) for path in (GENICAM_CHILD, link.__file__))
    assert numbers(theirs) == numbers(ours)
    assert len(numbers(ours)) == 3
    imported = {alias.name for node in ast.walk(theirs) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"json", "os", "signal", "socket", "sys", "time", "gi"}


def test_both_pythons_hand_a_picture_over_in_the_same_way():
    """The same slot of the memory, the same head but for what only a GenICam camera knows, and the same wait."""
    pixels = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    head = {"at": 1.0, "s": 2.0, "part": [None, None]}
    ours = handed_over(link.Link, lambda end: end, pixels, head)
    bare = {"shape": pixels.shape, "at": 1.0, "s": 2.0}
    theirs = handed_over(genicam_child().Link, socket.socket.detach, pixels.tobytes(), bare)
    assert ours == theirs
    message, stored = ours
    assert set(message) == {"kind", "slot", "shape", "at", "s", "part"}
    assert stored == pixels.tobytes()


def handed_over(kind, as_end, pixels, head):
    """Give the message and the memory that a picture leaves behind."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create("test")
    made = kind(as_end(theirs), memory)
    made.picture(pixels, head)
    message = json.loads(ours.recv(link.MAX_MESSAGE))
    stored = os.pread(memory, 96, message["slot"] * link.SLOT_BYTES)
    for end in (ours, made._link):
        end.close()
    os.close(memory)
    return message, stored


def genicam_child():
    """The program of the other Python, which this one can read as well."""
    spec = importlib.util.spec_from_file_location("genicam_child", GENICAM_CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(tree):
    """The protocol's numbers as a program writes them."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    wanted = {"SLOTS", "SLOT_BYTES", "MAX_MESSAGE"}
    return {node.targets[0].id: ast.unparse(node.value) for node in assigned if node.targets[0].id in wanted}
