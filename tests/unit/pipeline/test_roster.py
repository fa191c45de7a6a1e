"""The camera pool on paper: what has to be written, and what a worker has to start, stop and refuse."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cameras import FolderCamera
from pipeline.errors import ConfigError
from pipeline.roster import Refusal, difference, merged, parse, plan, read_list, read_record

PARTITIONS = 32


def camera(name, **keys):
    return FolderCamera(**{"id": name, "type": "folder", "product": "tray", "path": "p"} | keys)


def cameras(*names, **keys):
    return {name: camera(name, **keys) for name in names}


def block(name, **keys):
    return {"id": name, "type": "folder", "product": "tray", "path": "p", "station": name} | keys


def entries(*blocks):
    return read_list(list(blocks), "cameras.yaml")


def written(changes, present=None):
    """The topic after some changes."""
    table = dict(present or {})
    for change in changes:
        for place, value in change.writes:
            table.pop(place, None)
            if value is not None:
                table[place] = value
    return table


def planned(wanted, running, *, products=("tray",), taken=(), capacity=16):
    return plan(wanted, running, products=products, taken=taken, capacity=capacity)


def test_what_is_wanted_is_started_and_the_rest_stopped():
    """New cameras start, those that are gone stop, those that stay are left alone."""
    todo = planned(cameras("a", "b"), cameras("b", "c"))
    assert (todo.stop, todo.start, todo.refuse) == (("c",), (camera("a"),), {})


def test_a_camera_that_is_set_anew_is_stopped_and_started_and_keeps_its_place():
    """At full capacity a change costs nobody the camera, whatever other camera wants in."""
    changed = camera("z", rate=2.0)
    todo = planned({"a": camera("a"), "z": changed}, cameras("z"), capacity=1)
    assert (todo.stop, todo.start, set(todo.refuse)) == (("z",), (changed,), {"a"})


def test_beyond_capacity_what_runs_stays_and_the_others_are_refused_by_name():
    """A new camera never drives out one that is read, and the refusal does not depend on the order of records."""
    names = ["a", "b", "c", "d"]
    for order in (names, names[::-1]):
        todo = planned(cameras(*order), cameras("d"), capacity=3)
        assert [new.id for new in todo.start] == ["a", "b"]
        assert {name: refusal.reason for name, refusal in todo.refuse.items()} == {"c": "capacity"}


@given(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef"), max_size=3), st.integers(1, 4))
def test_every_camera_is_read_or_refused_and_capacity_holds(wanted, running, capacity):
    """After the plan each wanted camera runs or has a refusal, no other runs, and a second plan changes nothing."""
    running = set(sorted(running)[:capacity])
    todo = planned(cameras(*wanted), cameras(*running), capacity=capacity)
    after = running - set(todo.stop) | {new.id for new in todo.start}
    assert after | set(todo.refuse) == wanted
    assert after.isdisjoint(todo.refuse)
    assert len(after) <= capacity
    again = planned(cameras(*wanted), cameras(*after), capacity=capacity)
    assert (again.stop, again.start, again.refuse) == ((), (), todo.refuse)


def test_an_unknown_product_and_a_name_of_the_line_file_are_refused():
    """The refusal says which product there is, and that the name is given away."""
    todo = planned(
        {"a": camera("a", product="other"), "b": camera("b"), "c": camera("c")}, {}, taken=("b",), capacity=1
    )
    assert {name: refusal.reason for name, refusal in todo.refuse.items()} == {"a": "product_unknown", "b": "duplicate"}
    assert "tray" in todo.refuse["a"].text
    assert [new.id for new in todo.start] == ["c"]


def test_a_record_is_read_as_it_was_written():
    """A camera's block goes through the topic unchanged; one of another pool is nothing to this worker."""
    (entry,) = entries(block("c1", pool="hall-2", rate=2.5, loop=True))
    assert read_record(b"c1", entry.encode(), "hall-2") == entry.camera
    assert read_record(b"c1", entry.encode(), "default") is None
    assert set(json.loads(entry.encode())) == {"pool", "id", "type", "product", "station", "path", "rate", "loop"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"c1", b"\xff{"),
        (b"c1", b"[1]"),
        (b"c1", b"[" * 100_000),
        (b"c1", b'{"pool": 5, "id": "c1"}'),
        (b"c1", b'{"id": "c1", "type": "carrier-pigeon"}'),
        (b"c1", json.dumps(block("c1", product="No Such")).encode()),
        (b"c1", json.dumps(block("c1", sped=3)).encode()),
        (b"c2", json.dumps(block("c1")).encode()),
        (None, json.dumps(block("c1")).encode()),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(key, value):
    """Whatever somebody wrote into the topic becomes a refusal, never an exception."""
    refusal = read_record(key, value, "default")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "invalid"


def test_a_password_in_an_address_is_refused_and_not_repeated():
    """The refusal names the key and never the value."""
    rtsp = {"id": "c1", "type": "rtsp", "url": "rtsp://u:s3cret@h/x", "product": "tray"}
    refusal = read_record(b"c1", json.dumps(rtsp).encode(), "default")
    assert "url" in refusal.text
    assert "s3cret" not in refusal.text
    with pytest.raises(ConfigError, match=r"cameras.yaml: \[0\]: url") as caught:
        read_list([rtsp], "cameras.yaml")
    assert "s3cret" not in str(caught.value)


def test_a_graph_s_camera_is_not_of_a_pool():
    """A graph is made for the cameras of a line file: `cameras apply` refuses one in words, and so does a worker."""
    graph = {"id": "c1", "type": "rtsp", "url": "rtsp://h/x", "product": "tray", "decoder": "deepstream"}
    assert read_list([graph], "cameras.yaml")
    graph["inference"] = "graph"
    with pytest.raises(ConfigError, match=r"\[0\]: .* belongs in a worker's line file"):
        read_list([graph], "cameras.yaml")
    assert read_record(b"c1", json.dumps(graph).encode(), "default").reason == "invalid"


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"cameras": []}, "a list"),
        (None, "a list"),
        (["c1"], r"\[0\]: a camera is a mapping"),
        ([block("c1"), block("c1")], "two cameras are called 'c1'"),
        ([block("c1"), block("c2", path=None)], r"\[1\]: path"),
        ([block("c1", pool="no pool!")], "pool"),
        ([block("c1", station="s", pool="p"), block("c2", station="s", pool="q")], "station 's' is in two pools"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_its_place(document, told):
    """`cameras apply` writes all of a file or nothing of it."""
    with pytest.raises(ConfigError, match=told):
        read_list(document, "cameras.yaml")


def test_only_what_differs_is_written():
    """Applied twice, a file changes nothing the second time; a changed camera stays where it is."""
    wanted = entries(*(block(f"c{number}") for number in range(5)))
    first = difference(wanted, {}, PARTITIONS, prune=False)
    assert [change.kind for change in first] == ["added"] * 5
    present = written(first)
    assert difference(wanted, present, PARTITIONS, prune=True) == []
    (change,) = difference(entries(block("c3", rate=2.0)), present, PARTITIONS, prune=False)
    assert (change.kind, change.camera_id) == ("changed", "c3")
    assert [place for place, _ in change.writes] == [place for place in present if place[1] == "c3"]


def test_pruning_removes_what_is_not_listed_even_what_cannot_be_read():
    """With `--prune` the file is the whole truth; without it other cameras stay."""
    present = written(difference(entries(block("c1"), block("c2")), {}, PARTITIONS, prune=False))
    present[7, "junk"] = b"{"
    assert difference(entries(block("c1")), present, PARTITIONS, prune=False) == []
    changes = difference(entries(block("c1")), present, PARTITIONS, prune=True)
    assert [(change.kind, change.camera_id) for change in changes] == [("removed", "c2"), ("removed", "junk")]
    assert {place[1] for place in written(changes, present)} == {"c1"}


def test_a_record_in_a_wrong_partition_is_moved():
    """A camera that lies twice, or away from its station, ends in one place, with a tombstone for each other."""
    (entry,) = entries(block("c1", station="s"))
    (other,) = entries(block("c2", station="s"))
    present = {(3, "c1"): entry.encode(), (3, "c2"): other.encode(), (9, "c1"): entry.encode()}
    (change,) = difference([entry], present, PARTITIONS, prune=False)
    assert change.writes == (((9, "c1"), None), ((3, "c1"), entry.encode()))


def test_a_camera_that_goes_to_another_pool_is_removed_first():
    """The workers of two pools do not know of each other: a tombstone comes before the new record."""
    present = written(difference(entries(block("c1", pool="p")), {}, PARTITIONS, prune=False))
    (change,) = difference(entries(block("c1", pool="q")), present, PARTITIONS, prune=False)
    assert [value is None for _, value in change.writes] == [True, False]
    assert change.moves
    (change,) = difference(entries(block("c1", pool="p", rate=2.0)), present, PARTITIONS, prune=False)
    assert not change.moves


@given(st.lists(st.tuples(st.sampled_from("stuvw"), st.sampled_from("pq")), max_size=20), st.integers(1, 8))
def test_a_station_is_never_split(stations, partitions):
    """All cameras of a station of a pool lie in one partition, whatever was there before."""
    found = [block(f"c{n}", station=f"{pool}-{station}", pool=pool) for n, (station, pool) in enumerate(stations)]
    half = found[: len(found) // 2]
    present = written(difference(entries(*half), {}, partitions, prune=False))
    present = written(difference(entries(*found), present, partitions, prune=True), present)
    homes = {}
    for (partition, _), value in present.items():
        entry = parse(json.loads(value), "record")
        assert homes.setdefault(entry.station, partition) == partition
    assert len(present) == len(found)


@pytest.mark.parametrize("count", [4, 8, 16, 32, 40])
def test_stations_are_spread_for_workers_in_turns_and_in_runs(count):
    """Two workers have about as many cameras each, whether Kafka gave them every second partition or half a topic."""
    table = written(difference(entries(*(block(f"c{n}") for n in range(count))), {}, PARTITIONS, prune=False))
    taken = [partition for partition, _ in table]
    assert max(Counter(taken).values()) <= -(-count // PARTITIONS)
    for mine in (sum(number % 2 for number in taken), sum(number < PARTITIONS // 2 for number in taken)):
        assert abs(mine - count / 2) <= 1


def test_of_a_camera_in_two_partitions_one_counts():
    """A worker that has both reads the camera once, and a refusal does not hide one that can be read."""
    refusal = Refusal("invalid", "no JSON")
    good, refused = merged([{"a": refusal, "b": refusal}, {"a": camera("a"), "c": camera("c")}, {"c": camera("c")}])
    assert set(good) == {"a", "c"}
    assert refused == {"b": refusal}
