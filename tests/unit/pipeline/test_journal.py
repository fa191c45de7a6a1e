"""The journal on real files: what was appended is there, in order, whatever happened to the process or to the file."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.journal import Journal, stored

AT_MS = 1_700_000_000_000


@pytest.fixture
def opened(tmp_path):
    """Open journals on one folder, one after the other; the last one is closed at the end."""
    journals = []

    def make(**settings):
        for journal in journals:
            journal.close()
        journals[:] = [Journal(tmp_path, **settings)]
        journals[0].open()
        return journals[0]

    yield make
    for journal in journals:
        journal.close()


def payloads(records):
    return [record.payload for record in records]


def files(folder: Path, pattern: str = "*.outbox"):
    return sorted(folder.glob(pattern))


def test_what_was_appended_is_there_after_a_crash_in_order(opened):
    """An append is on disk when it returns: another run reads it, with its kind and its time."""
    journal = opened()
    journal.append([(1, b"a"), (2, b"b")], AT_MS)
    journal.append([(1, b"")], AT_MS + 5)
    again = opened()  # nothing was written at the end of the first one
    records = again.read(10)
    assert [(record.kind, record.payload, record.at_ms) for record in records] == [
        (1, b"a", AT_MS),
        (2, b"b", AT_MS),
        (1, b"", AT_MS + 5),
    ]
    assert dict(again.counts) == {1: 2, 2: 1}
    assert again.read(10) == []


def test_what_is_acknowledged_is_not_read_again(opened):
    """Acknowledgements are kept by the next append, and at the end by an empty one."""
    journal = opened()
    first, second, third = journal.append([(1, b"a"), (1, b"b"), (1, b"c")], AT_MS)
    journal.acknowledge([(second, 1)])
    journal.append([(1, b"d")], AT_MS)
    journal.acknowledge([(third, 1)])
    journal.append((), AT_MS)
    assert journal.unwritten == 0
    assert payloads(opened().read(10)) == [b"a", b"d"]
    assert first < second < third


def test_numbers_grow_over_restarts(opened):
    """No number is given twice while a record of an earlier run is left."""
    before = opened().append([(1, b"a")], AT_MS)
    assert opened().append([(1, b"b")], AT_MS) > before


def test_files_of_which_nothing_is_left_are_removed_oldest_first(opened, tmp_path):
    """A file goes when its records are acknowledged and those of all earlier ones; reading has no part in it."""
    journal = opened(segment_bytes=150)
    numbers = [journal.append([(1, bytes(150))], AT_MS)[0] for _ in range(4)]
    assert len(files(tmp_path)) == 4
    assert [record.number for _ in range(4) for record in journal.read(1)] == numbers
    journal.acknowledge([(numbers[1], 1)])
    assert len(files(tmp_path)) == 4
    journal.acknowledge([(numbers[0], 1)])
    assert len(files(tmp_path)) == 2
    assert payloads(opened().read(9)) == [bytes(150)] * 2


def test_a_journal_with_nothing_left_leaves_no_file(opened, tmp_path):
    """After the last acknowledgement the folder can be empty again, also the file that is written to."""
    journal = opened()
    journal.acknowledge([(number, 1) for number in journal.append([(1, b"a")], AT_MS)])
    journal.clear()
    assert files(tmp_path) == []
    assert journal.size == 0
    journal.append([(1, b"b")], AT_MS)
    assert payloads(opened().read(9)) == [b"b"]


@given(cut=st.integers(1, 60))
def test_a_record_cut_off_by_a_crash_is_passed_over(tmp_path_factory, cut):
    """Whatever of the last record did not get to disk, the earlier ones are there, and it is no damage."""
    folder = tmp_path_factory.mktemp("cut")
    journal = Journal(folder)
    journal.open()
    journal.append([(1, b"kept")], AT_MS)
    journal.append([(1, bytes(31))], AT_MS)  # 29 bytes before it
    journal.close()
    path = files(folder)[0]
    os.truncate(path, path.stat().st_size - cut)
    again = Journal(folder)
    again.open()
    assert payloads(again.read(9)) == [b"kept"]
    assert again.damaged == 0
    again.close()


def test_room_that_was_never_written_is_passed_over(opened, tmp_path):
    """A file that ends in zeros, as after a power cut, is no damage."""
    opened().append([(1, b"kept")], AT_MS)
    with files(tmp_path)[0].open("ab") as file:
        file.write(bytes(5000))
    again = opened()
    assert (payloads(again.read(9)), again.damaged) == ([b"kept"], 0)


def test_damage_costs_the_record_that_it_hit_and_the_file_is_kept(opened, tmp_path):
    """A flipped bit: the records around it are read, and the file is set aside by name once they are delivered."""
    opened().append([(1, b"one"), (1, b"two"), (1, b"three")], AT_MS)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b"two", b"tWo"))
    again = opened()
    records = again.read(9)
    assert payloads(records) == [b"one", b"three"]
    assert again.damaged == 1
    again.acknowledge([(record.number, 1) for record in records])
    assert files(tmp_path) == []
    assert b"tWo" in files(tmp_path, "*.damaged")[0].read_bytes()


@pytest.mark.parametrize("name", ["00000000000000000001.outbox", "notes.outbox"])
def test_a_foreign_file_is_set_aside_and_the_start_goes_on(opened, tmp_path, name):
    """Somebody else's bytes under a name like ours are kept under another name, and stop nobody."""
    (tmp_path / name).write_bytes(b"SQLite format 3\x00" + os.urandom(9000))
    journal = opened()
    assert (journal.read(9), journal.damaged) == ([], 1)
    assert [path.name.startswith(name) for path in files(tmp_path, "*.damaged")] == [True]
    journal.append([(1, b"a")], AT_MS)
    assert payloads(opened().read(9)) == [b"a"]


@given(data=st.binary(max_size=400), where=st.integers(0, 300))
def test_no_bytes_in_a_file_stop_the_start(tmp_path_factory, data, where):
    """Whatever overwrote a file, opening it ends, and what is read is what was appended."""
    folder = tmp_path_factory.mktemp("bytes")
    journal = Journal(folder)
    journal.open()
    journal.append([(1, b"payload-%d" % number) for number in range(6)], AT_MS)
    journal.close()
    path = files(folder)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:where] + data + whole[where + len(data) :])
    again = Journal(folder)
    again.open()
    assert set(payloads(again.read(99))) <= {b"payload-%d" % number for number in range(6)}
    again.close()


def test_two_workers_cannot_share_a_folder(opened, tmp_path):
    """The second one is told whose folder it is and what to do; the first one is not disturbed."""
    journal = opened()
    with pytest.raises(ConfigError, match="another worker") as caught:
        Journal(tmp_path).open()
    assert "LOGICRD_OUTBOX__DIR" in caught.value.hint
    journal.append([(1, b"a")], AT_MS)


def test_what_is_stored_can_be_read_while_it_is_written(opened, tmp_path):
    """Another process reads the unacknowledged records of a folder in use, and takes nothing from it.

    A file that is removed between listing and opening (here: a link to nothing) is passed over.
    """
    journal = opened()
    (tmp_path / "00000000000000000000.outbox").symlink_to(tmp_path / "removed")
    first, _ = journal.append([(1, b"a"), (1, b"b")], AT_MS)
    journal.acknowledge([(first, 1)])
    journal.append([(1, b"c")], AT_MS)
    assert payloads(stored(tmp_path)) == [b"b", b"c"]
    assert payloads(journal.read(9)) == [b"a", b"b", b"c"]


def test_a_full_disk_takes_nothing_by_halves_and_empties_itself(small_disk):
    """What was refused is not there, what was stored is; acknowledging needs no room, and makes some."""
    journal = Journal(small_disk, segment_bytes=256 * 1024)
    journal.open()
    numbers = []

    def append():
        numbers.extend(journal.append([(1, bytes(50_000)), (1, bytes(50_000))], AT_MS))

    while shutil.disk_usage(small_disk).free > 110_000:
        append()
    with pytest.raises(OSError, match="No space"):
        append()
    with pytest.raises(OSError, match="No space"):
        journal.probe()
    assert len(payloads(stored(small_disk))) == len(numbers)
    assert [record.number for record in journal.read(99)] == numbers
    journal.acknowledge([(number, 1) for number in numbers])
    journal.probe()
    journal.append([(1, b"again")], AT_MS)
    assert payloads(stored(small_disk)) == [b"again"]
    journal.close()


def test_a_disk_that_becomes_read_only_still_gives_what_it_holds(small_disk):
    """Nothing more is stored, everything stored can be read, also by the next run."""
    journal = Journal(small_disk)
    journal.open()
    journal.append([(1, b"a")], AT_MS)
    journal.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = Journal(small_disk)
    again.open()
    with pytest.raises(OSError, match="Read-only"):
        again.append([(1, b"b")], AT_MS)
    assert payloads(again.read(9)) == [b"a"]
    again.close()
