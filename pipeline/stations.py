"""What a station is set to: which views make a part, and what tells that a part is there.

A block of the line file. Without one, a station's cameras look at parts of their own: each frame is a part. Knows no
frame and no clock. Called by `config`, `parts` and `triggers`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.cameras import Block, Name, Product


class StationView(Block):
    """One camera's look at a part."""

    camera: Name
    """The camera, by its id."""
    required: bool = True
    """Whether a part can be OK without this view. An NG of any view makes the part NG."""
    product: Product | None = None
    """Judge this view always as this product; unset: as what the trigger names, else as the camera's product."""


class Station(Block):
    """One station of the line."""

    name: Name
    """The station that cameras name in `station`."""
    trigger: Literal["free_run", "counter", "message"] = "free_run"
    """What tells that a part is there. `free_run`: its first frame. `counter`: the camera's trigger counter, whose gaps
    are missed parts. `message`: a record on `<prefix>.trigger.v1`."""
    views: list[StationView] = Field(default=[])
    """The views of a part. Unset: in `free_run` each frame is a part, else all cameras of the station are required."""
    recipes: list[Product] = Field(default=[])
    """Products that a trigger may name besides those of the cameras; loaded and warmed up at start."""
    window_ms: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)] = 500.0
    """How far apart a frame and its trigger, or two views of a part without a stamped id, may be captured. Keep it
    below half of the shortest time between two parts."""
    max_missed: Annotated[int, Field(ge=0, le=10_000)] = 100
    """The longest gap of the trigger counter that counts as missed parts; a longer one is a counter that was reset."""

    @property
    def window_s(self) -> float:
        """`window_ms` in seconds."""
        return self.window_ms / 1e3

    def view(self, camera_id: str) -> StationView | None:
        """Find a camera's view."""
        return next((view for view in self.views if view.camera == camera_id), None)


def check_views(station: Station, here: set[str], *, pooled: bool) -> None:
    """Check a station against the cameras that the file gives it, and a pool may give it. Raises ValueError.

    All workers of a pool read every trigger, and none knows who else reads a station's cameras: triggers are for
    cameras of the file only.
    """
    place, named = f"stations: {station.name}", [view.camera for view in station.views]
    if len(set(named)) < len(named):
        raise ValueError(f"{place}: a camera is listed twice in `views`")
    strange = sorted(set(named) - here)
    if strange and not pooled:
        raise ValueError(f"{place}: no camera {strange[0]!r} has this station")
    if strange and station.trigger == "message":
        raise ValueError(
            f"{place}: no camera {strange[0]!r} in `cameras` has this station, and `trigger: message` is not for "
            "cameras of a pool: list it in `cameras`, or choose another trigger"
        )
    if named and (unlisted := sorted(here - set(named))):
        raise ValueError(f"{place}: camera {unlisted[0]!r} is not in `views`")
    if not here and not pooled:
        raise ValueError(f"{place}: no camera has this station")
    if not here and not named and station.trigger != "free_run":
        raise ValueError(f"{place}: no camera in `cameras` has this station; name those of the pool in `views`")
