"""What a line file cannot ask of cameras with `inference: graph`, whose graph asks Triton and keeps the pictures.

A graph asks one server for one product of each of its cameras, and stamps a frame when it is decoded. Pure; called by
`config` when the file is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.cameras import Camera, graph_cameras
from pipeline.servers import Triton
from pipeline.stations import Station


def check_graphs(
    cameras: Sequence[Camera], stations: Sequence[Station], triton: Triton, *, pooled: bool = False
) -> None:
    """Check the cameras of a file that are scored by a graph against the rest of it. Raises ValueError."""
    of_graphs = {camera.id: camera.product for camera in graph_cameras(cameras)}
    if not of_graphs:
        return
    if pooled:  # whose cameras come and go with any product
        raise ValueError("pool: a worker of a pool has no cameras with `inference: graph`: give them a worker alone")
    for who, product in _asked_by_line(cameras, stations, of_graphs):
        if product in of_graphs.values():
            raise ValueError(
                f"{who} is read otherwise than the product {product!r}, which a graph scores: both ways scale pictures "
                "differently and cannot share a threshold; set `inference: graph` on all of its cameras or on none"
            )
    if len(triton.addresses) > 1 or triton.tls is not None:
        raise ValueError(
            "triton: DeepStream asks one server, in plain text: with `inference: graph` name one address and no `tls`"
        )
    for station in stations:
        here = {camera.id for camera in cameras if camera.station == station.name}
        if named := sorted(here & of_graphs.keys()):
            _check_station(station, named[0], of_graphs)


def _asked_by_line(
    cameras: Sequence[Camera], stations: Sequence[Station], of_graphs: dict[str, str]
) -> Iterator[tuple[str, str | None]]:
    """Give what asks for a product by way of the line, and the product."""
    for camera in cameras:
        if camera.id not in of_graphs:
            yield f"cameras: {camera.id!r}", camera.product
    for station in stations:
        for view in station.views:
            if view.camera not in of_graphs:
                yield f"stations: {station.name}: the view of camera {view.camera!r}", view.product
        for product in station.recipes:
            yield f"stations: {station.name}: what a trigger names in `recipes`", product


def _check_station(station: Station, camera_id: str, products: dict[str, str]) -> None:
    if station.trigger != "free_run":
        raise ValueError(
            f"stations: {station.name}: `trigger: {station.trigger}` is not for camera {camera_id!r} with `inference: "
            "graph`, which tells neither a trigger's count nor the time of exposure, and has one product"
        )
    for view in station.views:
        if view.camera in products and view.product not in (None, products[view.camera]):
            raise ValueError(
                f"stations: {station.name}: the view of camera {view.camera!r} is of product {view.product!r}, and "
                f"its graph asks for {products[view.camera]!r}: a camera with `inference: graph` has one product"
            )
