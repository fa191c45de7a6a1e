"""Which addresses cameras may have."""

import socket
from ipaddress import ip_network

import pytest

from pipeline.cameras import FolderCamera, GenicamCamera, RtspCamera
from pipeline.errors import SourceError
from pipeline.networks import admitted, refusals, refuse_strangers

PLANT = [ip_network("10.20.0.0/16"), ip_network("fd00:20::/64")]
LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]


def rtsp(url, **settings):
    return RtspCamera(id="c1", type="rtsp", product="tray", url=url, **settings)


def genicam(address):
    return GenicamCamera(id="c1", type="genicam", product="tray", address=address)


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("rtsp://10.20.0.7:8554/a?b=c", "rtsp://10.20.0.7:8554/a?b=c"),
        ("rtsps://10.20.0.7/a", "rtsps://10.20.0.7/a"),
        ("rtsp://[fd00:20::7]:554/a", "rtsp://[fd00:20::7]:554/a"),
        ("rtsp://[::ffff:10.20.0.7]/a", "rtsp://10.20.0.7/a"),
        ("rtsp://169082887/a", "rtsp://10.20.0.7/a"),
    ],
)
def test_an_address_within_is_opened(url, opened):
    """Every way of writing one, and it is opened in the plain way."""
    assert admitted(rtsp(url), PLANT).url == opened


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://10.21.0.7/a",
        "rtsp://127.0.0.1:6379/a",
        "rtsp://0x7f000001/a",
        "rtsp://2130706433/a",
        "rtsp://[::1]/a",
        "rtsp://[::ffff:127.0.0.1]/a",
        "rtsp://[fd00:20:0:1::7]/a",
        "rtsp://localhost/a",
        "rtsp:///a",
        "rtsp://10.20.0.7\\.localhost/a",
        "rtsp://10.20.0.7:port/a",
    ],
)
def test_an_address_outside_is_not(url):
    """However it is written; the camera's name for it and what to do are said, the other cameras are not touched."""
    with pytest.raises(SourceError) as caught:
        admitted(rtsp(url), PLANT)
    assert caught.value.reason in {"address_refused", "unreachable"}
    assert caught.value.hint
    assert refusals([rtsp(url), rtsp("rtsp://10.20.0.7/a")], PLANT) == [f"camera 'c1' is not read: {caught.value}"]


def test_an_address_is_refused_for_good_and_a_name_for_now():
    """What a name stands for may change; an address stays what it is."""
    for url, final in (("rtsp://10.21.0.7/a", True), ("rtsp://localhost/a", False)):
        with pytest.raises(SourceError, match="outside of camera_networks") as caught:
            admitted(rtsp(url), PLANT)
        assert (caught.value.reason, caught.value.final) == ("address_refused", final)


def test_every_address_of_a_name_must_lie_within(monkeypatch):
    """One outside is enough to refuse it; else it is opened by the address that was looked at."""
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.20.0.{n}", 0)) for n in (7, 8)]
    stranger = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.21.0.9", 0))
    monkeypatch.setattr("pipeline.networks.socket.getaddrinfo", lambda *_, **__: answers)
    assert admitted(rtsp("rtsp://camera.plant/a"), PLANT).url == "rtsp://10.20.0.7/a"
    secure = rtsp("rtsps://camera.plant/a", decoder="gstreamer")
    assert admitted(secure, PLANT) == secure  # the certificate has the name
    answers.append(stranger)
    for camera in (rtsp("rtsp://camera.plant/a"), secure, genicam("camera.plant")):
        with pytest.raises(SourceError, match=r"10\.21\.0\.9"):
            admitted(camera, PLANT)


def test_genicam_cameras_by_address(tmp_path):
    """Addresses are compared; other names, and cameras that have no address, are left as they are."""
    assert admitted(genicam("10.20.0.7"), PLANT) == genicam("10.20.0.7")
    for address in ("10.21.0.7", "2130706433", "localhost"):
        with pytest.raises(SourceError, match="outside"):
            admitted(genicam(address), PLANT)
    folder = FolderCamera(id="c1", type="folder", product="tray", path=tmp_path)
    for camera in (genicam(""), genicam("Basler-21837461.invalid"), folder):
        assert admitted(camera, PLANT) is camera


def test_without_networks_nothing_is_looked_up(monkeypatch):
    """No setting, no limit and no delay."""
    monkeypatch.setattr("pipeline.networks.socket.getaddrinfo", None)
    camera = rtsp("rtsp://anywhere/a")
    assert admitted(camera, []) is camera


def test_a_connection_to_a_stranger_is_seen():
    """Of this process's own connections, each peer is compared."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        refuse_strangers(LOOPBACK)
        refuse_strangers([])
        with pytest.raises(SourceError, match=r"127\.0\.0\.1"):
            refuse_strangers(PLANT)
