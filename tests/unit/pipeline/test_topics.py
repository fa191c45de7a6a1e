"""Which topics are made, and what is said of those that are there."""

from __future__ import annotations

from pipeline.topics import TOPICS, plan


def test_all_topics_are_wanted_of_an_empty_broker():
    """Each gets the partitions asked for, and the topic of the camera pools its own number and compaction."""
    wanted, faults = plan("plant", {}, partitions=3, copies=1)
    assert [topic.name for topic in wanted] == [f"plant.{topic.kind}" for topic in TOPICS]
    by_name = {topic.name: topic for topic in wanted}
    assert by_name["plant.verdict.v1"].partitions == 3
    assert by_name["plant.cameras.v1"].partitions == 32
    assert by_name["plant.cameras.v1"].settings == {"cleanup.policy": "compact"}
    assert faults == {}


def test_topics_that_are_there_are_left_alone():
    """A second call wants nothing, whatever the number of partitions is."""
    present = {f"plant.{topic.kind}": dict(topic.settings) for topic in TOPICS}
    assert plan("plant", present, partitions=99, copies=3) == ([], {})


def test_three_copies_take_verdicts_while_one_is_away():
    """`min.insync.replicas` is two with three copies, and the broker's own with fewer."""
    assert all(topic.settings["min.insync.replicas"] == "2" for topic in plan("p", {}, partitions=1, copies=3)[0])
    assert all("min.insync.replicas" not in topic.settings for topic in plan("p", {}, partitions=1, copies=2)[0])


def test_a_pool_topic_that_forgets_is_a_fault():
    """Kafka would remove cameras by their age: said by name, and nothing else is wrong."""
    present = {f"p.{topic.kind}": dict(topic.settings) for topic in TOPICS}
    present["p.cameras.v1"] = {"cleanup.policy": "compact,delete"}
    wanted, faults = plan("p", present, partitions=1, copies=1)
    assert wanted == []
    assert faults == {"p.cameras.v1": "cleanup.policy is compact,delete, not compact"}
