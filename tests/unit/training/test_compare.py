"""The comparison on a tiny product: equal terms, nothing done twice, and a table that says what the results say."""

import shutil

import pytest

from training import compare
from training.compare import MODEL, NETWORKS, ROWS, Equal, Result, product_folders, run_all, tasks_of
from training.detector import load_bundle
from training.errors import DataError
from training.evaluate import evaluate
from training.speed import measure_speed
from training.table import Speed, make_table, markdown
from training.teacher import random_teacher, weights_sha256

TEACHER = random_teacher(0)
EQUAL = Equal(image_size=64, steps=2, batch_size=4, teacher_arch="resnet18", teacher_sha256=weights_sha256(TEACHER))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def tasks(loco, out):
    return tasks_of([loco], out, TEACHER, EQUAL, ["rd", "logicrd"], [1, 2], keep_models=True)


@pytest.fixture(scope="module")
def results(tasks) -> list[Result]:
    return run_all(tasks, 1, lambda *_: None)


def test_all_networks_get_equal_terms(loco, out):
    """Steps, batch, size and seed are equal; the recipe is each method's own; nothing may end a run early."""
    tasks = tasks_of([loco], out, TEACHER, EQUAL, list(NETWORKS), [5])
    configs = {task.network: task.config for task in tasks}
    assert {(c.max_steps, c.batch_size, c.image_size, c.seed) for c in configs.values()} == {(2, 4, 64, 5)}
    assert {c.max_minutes for c in configs.values()} == {1e6}
    assert (configs["rd"].schedule, configs["rd"].width) == ("constant", 512)
    switches = {name: (c.gse, c.fcp, c.nii) for name, c in configs.items() if c.method == "logicrd"}
    assert switches == {
        "none": (False, False, False),
        "gse": (True, False, False),
        "fcp": (True, True, False),
        "logicrd": (True, True, True),
    }


def test_results_are_kept_and_not_repeated(tasks, results, monkeypatch):
    """A second run reads what is there; checkpoints are gone once a result is written."""
    monkeypatch.setattr(compare, "fit", lambda *_: pytest.fail("trained again"))
    assert [compare.run_one(task, 1) for task in tasks] == results
    assert not list(tasks[0].out.rglob("checkpoint*"))


def test_models_are_kept_on_request(loco, folder, tmp_path, tasks, results):
    """The kept bundle scores what the result says; without the request there is none."""
    report = evaluate(load_bundle(tasks[0].folder / MODEL), folder).report
    assert report.image == results[0].report.image
    plain = tasks_of([loco], tmp_path, TEACHER, EQUAL, ["rd"], [1])[0]
    compare.run_one(plain, 1)
    assert not (plain.folder / MODEL).exists()


@pytest.mark.usefixtures("results")
def test_a_result_of_other_settings_is_refused(tasks):
    other = tasks[0].config.model_copy(update={"max_steps": 3})
    task = compare.Task(tasks[0].data, tasks[0].out, tasks[0].network, other, TEACHER)
    with pytest.raises(DataError, match="other settings"):
        compare.run_one(task, 1)


def test_rows_take_the_map_or_the_fused_score(results):
    """RD is judged by its map, as published; LogicRD by the fused score."""
    table = make_table(results, {}, EQUAL, "here")
    by_title = {line.title: line for line in table.lines}
    assert list(by_title) == [row.title for row in ROWS if row.network in ("rd", "logicrd")]
    for title, network, branch in (("RD", "rd", "map_score"), (ROWS[-1].title, "logicrd", None)):
        own = [r.report for r in results if r.network == network]
        found = [(r.branches[branch] if branch else r.image.image_auroc).logical for r in own]
        assert by_title[title].image_auroc["logical"].mean == pytest.approx(sum(found) / 2)
        assert by_title[title].image_auroc["logical"].deviation is not None


def test_markdown_states_differences_and_ratios(results):
    """LogicRD less RD in points of the same table, and the ratio of speeds."""
    speeds = {"rd": Speed(batch_1=10, batch_8=20), "logicrd": Speed(batch_1=9, batch_8=30)}
    table = make_table(results, speeds, EQUAL, "here")
    text = markdown(table)
    lines = {line.title: line for line in table.lines}
    rd, ours = (lines[title].image_auroc["mean"].mean for title in ("RD", ROWS[-1].title))
    assert f"mean {100 * (ours - rd):+.1f} points; 0.90 x its images/s at batch 1, 1.50 x at batch 8." in text
    assert "LogicRD less DSKD" not in text


def test_product_folders(loco, tmp_path):
    assert product_folders(loco) == [loco]
    shutil.copytree(loco, tmp_path / "b")
    shutil.copytree(loco, tmp_path / "a")
    assert [folder.name for folder in product_folders(tmp_path)] == ["a", "b"]
    with pytest.raises(DataError, match="neither a product"):
        product_folders(tmp_path / "a" / "train" / "good")


def test_speed_is_measured_for_each_network_and_batch(results):
    configs = {result.network: result.config.network() for result in results}
    speeds = measure_speed(configs, "resnet18", rounds=1)
    assert speeds.keys() == configs.keys()
    assert all(speed.batch_1 > 0 and speed.batch_8 > 0 for speed in speeds.values())


def test_a_damaged_result_is_named(tmp_path, tasks):
    task = compare.Task(tasks[0].data, tmp_path, "rd", tasks[0].config, TEACHER)
    task.folder.mkdir(parents=True)
    (task.folder / compare.RESULT).write_text("garbage")
    with pytest.raises(DataError, match=r"result\.json': is damaged"):
        compare.run_one(task, 1)
