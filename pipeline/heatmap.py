"""An anomaly map drawn over its picture, on a fixed scale: below the limit nothing, above it the inferno colours.

The scale comes from the manifest, never from the picture at hand: stretched to its own extremes, every good part would
show a defect. A contour marks the limit. Pure.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.manifest import HeatMapScale
from pipeline.types import AnomalyMap, Image

_STRONGEST = 0.6
_CONTOUR = (0, 255, 255)


def overlay(image: Image, anomaly_map: AnomalyMap, scale: HeatMapScale) -> Image:
    """Draw an (h, w) map over an HWC uint8 RGB picture; gives a picture of the same size.

    Values are placed on `scale.limit`..`scale.high` and clamped there; opacity grows to 0.6 with the value.
    """
    height, width = image.shape[:2]
    # A value that is not finite is drawn as the strongest or as nothing: it must not blot out its neighbours.
    anomaly_map = np.nan_to_num(anomaly_map, nan=scale.low, posinf=scale.high, neginf=scale.low).astype(np.float32)
    enlarged = cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_LINEAR)
    span = max(scale.high - scale.limit, 1e-12)
    strength = np.clip((enlarged - scale.limit) / span, 0.0, 1.0)
    above = enlarged > scale.limit
    # The lower third of inferno is nearly black: start where it can be seen on a dark part.
    coloured = cv2.applyColorMap((85 + 170 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = np.where(above, 0.25 + (_STRONGEST - 0.25) * strength, 0.0)[..., None]
    blended = np.ascontiguousarray((image * (1 - opacity) + coloured * opacity).astype(np.uint8))
    contours, _ = cv2.findContours(above.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(blended, contours, -1, _CONTOUR, 1)
    return blended
