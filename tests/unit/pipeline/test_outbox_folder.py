"""What `logicrd check` says of the outbox's folder, on real files and disks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Outbox as Settings
from pipeline.errors import CheckError, ConfigError
from pipeline.journal import Journal
from pipeline.outbox_folder import file_system, look

MB = 1024 * 1024


@pytest.fixture
def journal(tmp_path):
    """A worker's journal, open, with something in it."""
    made = Journal(tmp_path)
    made.open()
    made.append([(1, bytes(3 * MB))], 0)
    yield made
    made.close()


def test_a_folder_of_a_running_worker_is_said_to_be_one_and_left_alone(journal, tmp_path):
    """In use is no fault: what it holds is told, nothing is left there, and the worker goes on writing.

    A file that its worker removes meanwhile (here: listed, and not there) is no fault either.
    """
    (tmp_path / "00000000000000000009.outbox").symlink_to(tmp_path / "removed")
    before = sorted(tmp_path.iterdir())
    found = look(Settings(dir=tmp_path, max_mb=1))
    assert "in use by a worker, holds 3 of 1 MB" in found.said
    assert sorted(tmp_path.iterdir()) == before
    journal.append([(1, b"more")], 0)
    journal.close()
    assert "in use by nobody" in look(Settings(dir=tmp_path)).said


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path):
    """The first run makes it; the check sees that it can."""
    assert "made by the first run, holds 0 of 2048 MB" in look(Settings(dir=tmp_path / "a/b")).said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_no_worker_could_take_is_a_fault_of_the_line_file(tmp_path, small_disk):
    """A file in its place or above it, and a place where nothing can be made: exit code 3, as `run` has it."""
    (tmp_path / "file").write_text("")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in (tmp_path / "file", tmp_path / "file/outbox", small_disk / "outbox"):
        with pytest.raises(ConfigError, match=str(folder)) as caught:
            look(Settings(dir=folder))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_fails_the_check(small_disk, fault):
    """A worker would start there, and no verdict of it would be OK: exit code 5."""
    if fault == "full":
        (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckError, match="no verdict would be OK") as caught:
        look(Settings(dir=small_disk))
    assert caught.value.exit_code == 5


def test_too_little_room_and_a_disk_that_forgets_are_doubts(small_disk):
    """Memory is told as such, and `max_mb` beside the room there is; what the outbox holds already counts as room."""
    doubts = " ".join(look(Settings(dir=small_disk)).doubts)
    assert "tmpfs, memory" in doubts
    assert "outbox.max_mb is 2048, and its disk has room for 1 MB" in doubts
    (small_disk / "00000000000000000001.outbox").write_bytes(bytes(MB // 2))
    assert "max_mb" not in " ".join(look(Settings(dir=small_disk, max_mb=1)).doubts)
    assert look(Settings(dir=None)).doubts != ()


def test_the_file_system_is_that_of_the_innermost_mount():
    """The longest mount point that holds the path, the later of two at one place, with its escapes undone."""
    kinds = {"/": "overlay", "/data": "ext4", "/data/my\\040share": "nfs4", "/database": "xfs"}
    mounts = "".join(f"1 2 0:1 / {place} rw - {kind} x rw\n" for place, kind in kinds.items())
    mounts += "1 2 0:1 / /database rw shared:1 - tmpfs x rw\n"
    expected = {"/data/my share/out": "nfs4", "/data/mine": "ext4", "/database/x": "tmpfs", "/var": "overlay"}
    assert {place: file_system(Path(place), mounts) for place in expected} == expected


def test_check_ends_at_the_outbox_before_it_asks_any_server(line_file, models_repo, tmp_path):
    """The command names the folder and ends with the code of the fault; no server answers in this test."""
    assert models_repo.is_dir()
    (tmp_path / "taken").write_text("")
    command = [sys.executable, "-m", "pipeline.cli", "check", "--json", "-c"]
    path = line_file(outbox={"dir": "taken"})
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, "taken" in done.stderr) == (3, "", True), done.stderr
