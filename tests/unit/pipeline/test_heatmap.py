"""The overlay: a fixed scale, and nothing below the limit."""

import numpy as np
import pytest

from pipeline.heatmap import overlay
from pipeline.manifest import HeatMapScale

SCALE = HeatMapScale(limit=1.0, low=0.0, high=2.0)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def test_a_good_part_stays_as_it_is(image):
    """A map below the limit, at it, or far below changes no pixel, however uneven it is."""
    for low, high in ((0.0, 0.99), (1.0, 1.0), (-1e6, 0.0)):
        anomaly_map = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
        assert np.array_equal(overlay(image, anomaly_map, SCALE), image)


def test_only_the_marked_area_is_coloured(image):
    """A hot corner is coloured, the far corner is not, and the given picture is left alone."""
    before = image.copy()
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[:2, :2] = 3.0
    drawn = overlay(image, anomaly_map, SCALE)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert not np.array_equal(drawn[:16, :16], image[:16, :16])
    assert np.array_equal(drawn[48:, 64:], image[48:, 64:])
    assert np.array_equal(image, before)


def test_the_scale_is_fixed(image):
    """Values past the top of the scale look like the top: the colours never stretch to the picture at hand."""
    full, beyond = (np.full((8, 8), value, np.float32) for value in (2.0, 2000.0))
    assert np.array_equal(overlay(image, full, SCALE), overlay(image, beyond, SCALE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_can_be_drawn(image, bad):
    """A value that is not finite breaks no picture: it is drawn without a warning, the rest as ever."""
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[2, 2] = bad
    drawn = overlay(image, anomaly_map, SCALE)
    assert np.array_equal(drawn[72:, 96:], image[72:, 96:])


def test_a_scale_without_height_draws(image):
    """`high` on `limit` divides by nothing: what lies above has the top colour."""
    flat = HeatMapScale(limit=1.0, low=1.0, high=1.0)
    assert not np.array_equal(overlay(image, np.full((8, 8), 1.5, np.float32), flat), image)
