"""Which addresses cameras may have: those within the networks that the line file names, and no others.

The line file, and the records of a camera pool above all, say where a worker connects to; whoever may write them must
not send it to a server of the plant. A name is looked up and the camera is opened by the address that was found, so
that a second look-up cannot lead elsewhere. Opens no camera. Called by `sources`, and by the commands that tell of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from urllib.parse import SplitResult, urlsplit, urlunsplit

from pipeline.cameras import Camera, GenicamCamera, RtspCamera
from pipeline.errors import SourceError

Networks = Sequence[IPv4Network | IPv6Network]
"""Where cameras may be; none of them: anywhere."""
Address = IPv4Address | IPv6Address

_REASON = "address_refused"
_HINT = "correct the camera's address, or add its network to `camera_networks`"


def admitted(camera: Camera, networks: Networks) -> Camera:
    """Give the camera as it may be opened, named by an address within the networks. Blocks while a name is looked up.

    Raises SourceError with the reason `address_refused`, final where the address itself was given, or `unreachable`
    for a name that nobody knows. A GenICam camera that is named by no address is left as it is: it is found on the
    worker's own links.
    """
    if not networks:
        return camera
    if isinstance(camera, RtspCamera):
        return _admitted_stream(camera, networks)
    if isinstance(camera, GenicamCamera) and (found := _look_up(camera.address)):
        return camera.model_copy(update={"address": str(_within(camera.address, found, networks))})
    return camera


def refusals(cameras: Iterable[Camera], networks: Networks) -> list[str]:
    """Say of each camera that cannot be opened for its address why. Blocks while names are looked up."""
    said = []
    for camera in cameras:
        try:
            admitted(camera, networks)
        except SourceError as error:
            said.append(f"camera {camera.id!r} is not read: {error}")
    return said


def refuse_strangers(networks: Networks) -> None:
    """See that this process is connected to nobody outside of the networks: a camera may have sent it there.

    Raises SourceError.
    """
    for peer in _peers() if networks else ():
        _within("the camera's redirection", [peer], networks)


def _admitted_stream(camera: RtspCamera, networks: Networks) -> RtspCamera:
    parts = urlsplit(camera.url)
    host = parts.hostname or ""
    found = _look_up(host)
    if not found:
        raise SourceError(
            f"{camera.url}: no address is known of {host!r}", reason="unreachable", hint="check the address"
        )
    address = _within(host, found, networks)
    if parts.scheme == "rtsps" and camera.decoder != "ffmpeg":
        return camera  # GStreamer compares the name with the certificate's
    return camera.model_copy(update={"url": urlunsplit(parts._replace(netloc=_place(address, parts)))})


def _place(address: Address, parts: SplitResult) -> str:
    host = f"[{address}]" if address.version == 6 else str(address)
    try:
        port = parts.port
    except ValueError as error:
        raise SourceError(f"{parts.geturl()}: {error}", reason=_REASON, hint=_HINT, final=True) from None
    return host if port is None else f"{host}:{port}"


def _within(name: str, found: Sequence[Address], networks: Networks) -> Address:
    """Give the first of a name's addresses. Raises SourceError unless all lie within the networks."""
    for address in found:
        if not any(address in network for network in networks):
            shown = name if name == str(address) else f"{name} ({address})"
            allowed = ", ".join(map(str, networks))
            text = f"{shown} lies outside of camera_networks ({allowed})"
            raise SourceError(text, reason=_REASON, hint=_HINT, final=name == str(address))
    return found[0]


def _look_up(name: str) -> list[Address]:
    """Give all addresses that a name stands for, in any way of writing them; none for a name that nobody knows."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name else []
    except (OSError, ValueError):  # ValueError: no name that could be looked up
        return []
    return [_plain(str(address[0])) for *_, address in answers]


def _plain(text: str) -> Address:
    """Read an address; one of IPv4 that is dressed as IPv6 is what it is."""
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _peers() -> Iterator[Address]:
    """Give the address at the other end of each of this process's connections."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            copy = os.dup(int(entry.name))
        except OSError:  # the listing's own
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with connection:
            try:
                peer = connection.getpeername()
            except OSError:  # not connected
                continue
        if connection.family in {socket.AF_INET, socket.AF_INET6}:
            yield _plain(str(peer[0]))
