"""Rules and dashboard: understood by Prometheus, and of metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from chart import CHART, PROMTOOL, ROOT, one, render

from pipeline.metrics import Metrics

RULES = CHART / "files/rules.yaml"
DASHBOARD = CHART / "files/dashboard.json"
# Triton's, from its documentation (docs/user_guide/metrics.md), and Prometheus's own.
FOREIGN = {"nv_inference_queue_duration_us", "nv_inference_request_success", "nv_gpu_utilization", "up", "ALERTS"}
WORDS = {
    "sum",
    "by",
    "rate",
    "increase",
    "max",
    "min_over_time",
    "unless",
    "avg",
    "count",
    "histogram_quantile",
    "clamp_min",
    "and",
    "or",
    "label_values",
}


def expressions() -> list[str]:
    """Give every expression of rules and dashboard."""
    rules = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [*rules, *(target["expr"] for panel in panels for target in panel["targets"])]


def recorded() -> set[str]:
    return {
        rule["record"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def series_of_the_line() -> dict[str, set[str]]:
    """Give the series that a worker serves, each with its labels."""
    found: dict[str, set[str]] = {}
    for family in Metrics().registry._names_to_collectors.items():
        name, collector = family
        labels = set(getattr(collector, "_labelnames", ()))
        if name.endswith("_bucket"):
            labels.add("le")
        found[name] = labels
    return found


def used(expression: str) -> list[tuple[str, set[str]]]:
    """Give the series of an expression, each with the labels that its matchers name."""
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", expression)
    found = []
    for name, matchers in re.findall(
        r"([A-Za-z_:][A-Za-z0-9_:]*)\s*(\{[^}]*\})?", re.sub(r'"[^"]*"|\[[^\]]*\]', "", bare)
    ):
        if name not in WORDS and (matchers or "_" in name) and not re.fullmatch(r"e[0-9]+", name):
            found.append((name, set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers))))
    return found


@pytest.mark.parametrize("expression", expressions())
def test_metrics_and_labels_exist(expression):
    """Each series is one that the line, Triton or a rule of ours makes, with the labels that are asked for."""
    line = series_of_the_line()
    of_the_scrape = {"namespace", "pod", "endpoint"}
    series = used(expression)
    assert series
    for name, labels in series:
        if name in line:
            assert labels <= line[name] | of_the_scrape, name
        else:
            assert name in FOREIGN | recorded(), name


def test_the_check_knows_what_does_not_exist():
    """The check above can fail."""
    assert used('rate(inspection_framez_total{camera="a"}[5m])') == [("inspection_framez_total", {"camera"})]
    assert "inspection_framez_total" not in series_of_the_line()
    assert "camera" in series_of_the_line()["inspection_frames_total"]


@pytest.mark.parametrize("arguments", [("check", "rules", str(RULES)), ("test", "rules", "chart_rules_test.yaml")])
def test_promtool(arguments):
    """Prometheus's own tool takes the rules, and each says what it should of made-up series."""
    folder = ROOT / "tests/contract"
    done = subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", ["full-values.yaml", "hpa-image-values.yaml"])
def test_promtool_takes_the_rules_as_rendered(values, tmp_path):
    """With another namespace and budget in them."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(one(render(values), "PrometheusRule")["spec"]))
    done = subprocess.run([PROMTOOL, "check", "rules", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_says_what_to_do():
    """Named in promtool's tests; a summary and a description; severity one of two."""
    tests = (ROOT / "tests/contract/chart_rules_test.yaml").read_text()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["alert"] in tests
                assert rule["annotations"].keys() == {"summary", "description"}
                assert rule["labels"]["severity"] in {"critical", "warning"}


def test_autoscalers_follow_a_series_that_is_recorded():
    """KEDA's query and the adapter's rule name it."""
    query = one(render("full-values.yaml"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    adapter = yaml.safe_load((CHART / "files/prometheus-adapter.yaml").read_text())["rules"]["custom"][0]
    (series,) = recorded()
    assert series in query
    assert series in adapter["seriesQuery"]
    metric = one(render("hpa-image-values.yaml"), "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]
    assert adapter["name"]["as"] == metric["name"]


def test_the_dashboard_is_rendered_as_it_lies_there():
    """The ConfigMap holds the file; each panel has a title, a unit and a place of its own."""
    data = one(render("full-values.yaml"), "ConfigMap", "plant-dashboard")["data"]
    document = json.loads(data["logicrd.json"])
    assert document == json.loads(DASHBOARD.read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]]
    assert len(set(places)) == len(places) == len({panel["title"] for panel in document["panels"]})
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in document["panels"])


@pytest.mark.parametrize(("link", "target"), [("grafana/logicrd.json", DASHBOARD), ("prometheus/rules.yaml", RULES)])
def test_deploy_has_the_same_files(link, target):
    """One copy: what lies in `deploy/` is the chart's."""
    assert (ROOT / "deploy" / link).resolve() == Path(target).resolve()


def test_every_alert_has_its_paragraph_in_the_runbook():
    """And the runbook has none of an alert that is gone."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    text = (CHART.parents[1] / "deploy/RUNBOOK.md").read_text()
    told = dict(re.findall(r"^## (\w+)\n((?:.+\n)+)", text, re.M))
    assert sorted(told) == sorted(alerts)
    assert all(len(paragraph) > 100 for paragraph in told.values())
