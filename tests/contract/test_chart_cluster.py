"""What the chart asks of its cluster, and of operators in it: off, by default, and with each value set."""

from __future__ import annotations

import pytest
import yaml
from chart import CI_VALUES, kinds, one, pods, render

# --- scaling and spreading


def test_replicas_are_written_only_without_autoscaling():
    """With an autoscaler an upgrade leaves the count to it."""
    assert one(render(), "Deployment")["spec"]["replicas"] == 2
    assert one(render(overrides={"triton": {"replicas": 5}}), "Deployment")["spec"]["replicas"] == 5
    for values in ("full-values.yaml", "hpa-image-values.yaml"):
        assert "replicas" not in one(render(values), "Deployment")["spec"]


def test_no_autoscaler_by_default():
    """Neither kind."""
    assert not {"HorizontalPodAutoscaler", "ScaledObject"} & {each["kind"] for each in render()}


def test_hpa_on_queue_time():
    """autoscaling/v2, the metric of prometheus-adapter, in seconds a request and pod."""
    hpa = one(render("hpa-image-values.yaml"), "HorizontalPodAutoscaler")
    assert hpa["apiVersion"] == "autoscaling/v2"
    spec = hpa["spec"]
    assert spec["scaleTargetRef"]["name"] == "t-logicrd-triton"
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 4)
    assert spec["metrics"][0]["pods"]["target"] == {"type": "AverageValue", "averageValue": "50m"}
    assert spec["metrics"][0]["pods"]["metric"]["name"] == "logicrd_triton_queue_seconds_per_request"
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert spec["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 0


def test_keda_on_queue_time_and_shifts():
    """The recorded series of this release; a Prometheus without an answer is a fault; one cron a shift."""
    spec = one(render("full-values.yaml"), "ScaledObject")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 6)
    prometheus, cron = spec["triggers"]
    assert prometheus["metadata"]["threshold"] == "0.04"
    assert prometheus["metadata"]["ignoreNullValues"] == "false"
    assert 'namespace="prod", pod=~"plant-triton-.+"' in prometheus["metadata"]["query"]
    assert cron["metadata"]["desiredReplicas"] == "4"
    assert spec["fallback"]["replicas"] == 6


def test_budgets_of_disruption_only_for_two_and_more():
    """Of one replica a budget would forbid every drain of its node."""
    names = [each["metadata"]["name"] for each in kinds(render(), "PodDisruptionBudget")]
    assert names == ["t-logicrd-triton"]
    full = [each["metadata"]["name"] for each in kinds(render("full-values.yaml"), "PodDisruptionBudget")]
    assert sorted(full) == ["plant-trays", "plant-triton"]
    assert kinds(render(overrides={"triton": {"replicas": 1}}), "PodDisruptionBudget") == []
    off = {"triton": {"podDisruptionBudget": {"enabled": False}}}
    assert kinds(render(overrides=off), "PodDisruptionBudget") == []


def test_budgets_and_spread_select_the_pods_they_are_for():
    """Every selector matches the labels of its own pods and of no other component's."""
    manifests = render("full-values.yaml")
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in (*kinds(manifests, "StatefulSet"), *kinds(manifests, "Deployment"))
    }
    for budget in kinds(manifests, "PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert [name for name, has in labels.items() if wanted <= has.items()] == [budget["metadata"]["name"]]
    for name, spec in pods(manifests).items():
        for constraint in spec.get("topologySpreadConstraints", []):
            assert constraint["labelSelector"]["matchLabels"].items() <= labels[name.partition("/")[2]].items()


def test_spread_over_nodes():
    """On by default as a wish, as given, and off."""
    key = "topologySpreadConstraints"
    assert pods(render())["Deployment/t-logicrd-triton"][key][0]["whenUnsatisfiable"] == "ScheduleAnyway"
    assert pods(render("full-values.yaml"))["Deployment/plant-triton"][key][0]["whenUnsatisfiable"] == "DoNotSchedule"
    assert key not in pods(render("external-plain-values.yaml"))["StatefulSet/t-logicrd-desk"]


# --- network


def test_no_policies_when_off():
    """`networkPolicy.enabled: false` makes none."""
    assert kinds(render("external-plain-values.yaml"), "NetworkPolicy") == []


@pytest.mark.parametrize("values", [name for name in CI_VALUES if "plain" not in name])
def test_policies_name_every_peer(values):
    """No rule lets everybody in or out: each has peers, and each peer names something."""
    policies = kinds(render(values), "NetworkPolicy")
    assert len(policies) == 2
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in (*policy["spec"]["ingress"], *policy["spec"]["egress"]):
            peers = rule.get("from") or rule.get("to")
            assert peers
            assert all(peers)
            assert all(selector for peer in peers for selector in peer.values())


def test_policies_let_the_line_through():
    """Each server at its port; metrics in; Triton from the line's pods and Prometheus alone."""
    manifests = render("full-values.yaml")
    line = one(manifests, "NetworkPolicy", "plant-line")["spec"]
    ports = [sorted(str(port["port"]) for port in rule.get("ports", [])) for rule in line["egress"]]
    assert ports == [["53", "53"], ["8001"], ["9094"], ["6380"], [], ["4317"], ["9000"]]
    assert [rule["ports"] for rule in line["ingress"]] == [[{"port": 9400}]]
    triton = one(manifests, "NetworkPolicy", "plant-triton")["spec"]
    assert [rule["ports"] for rule in triton["ingress"]] == [[{"port": 8001}], [{"port": 8002}]]
    selected = line["podSelector"]["matchExpressions"][0]["values"]
    for name, spec in pods(manifests).items():
        assert ("triton" in name) or spec, name
    components = {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for each in (*kinds(manifests, "StatefulSet"), *kinds(manifests, "Job"))
    } | {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in kinds(manifests, "Pod")}
    assert components == set(selected)


def test_policies_without_a_bucket_let_triton_reach_nothing():
    """No egress at all, not even names."""
    assert one(render(), "NetworkPolicy", "t-logicrd-triton")["spec"]["egress"] == []


def test_policies_of_a_triton_somewhere_else():
    """Its peers and the ports of its addresses."""
    policy = {"enabled": True} | {
        name: [{"ipBlock": {"cidr": f"10.{n}.0.0/16"}}] for n, name in enumerate(("kafka", "redis", "triton"))
    }
    policy["cameras"] = {"peers": [{"ipBlock": {"cidr": "10.9.0.0/16"}}]}
    spec = one(render("external-plain-values.yaml", {"networkPolicy": policy}), "NetworkPolicy")["spec"]
    assert {"to": [{"ipBlock": {"cidr": "10.2.0.0/16"}}], "ports": [{"port": 8001}, {"port": 8001}]} in spec["egress"]


# --- Strimzi


def test_strimzi_is_off_by_default():
    """No resource of it."""
    assert "strimzi.io" not in str(render())


def test_strimzi_makes_the_brokers_and_the_lines_user():
    """TLS listener with certificates, no topic by accident; the line has the authority and its own certificate."""
    manifests = render("hpa-image-values.yaml")
    kafka = one(manifests, "Kafka")["spec"]["kafka"]
    assert kafka["listeners"][0] == {
        "name": "tls", "port": 9093, "type": "internal", "tls": True, "authentication": {"type": "tls"}
    }  # fmt: skip
    assert kafka["config"]["auto.create.topics.enable"] is False
    assert one(manifests, "KafkaNodePool")["spec"]["replicas"] == 3
    user = one(manifests, "KafkaUser")
    assert user["metadata"]["name"] == "t-logicrd-kafka-line"
    rights = [
        (rule["resource"]["type"], rule["resource"].get("name")) for rule in user["spec"]["authorization"]["acls"]
    ]
    # The names are those of `pipeline.topics`, `pool` and `triggers`, whose groups are of the line and not of a prefix.
    assert rights == [
        ("topic", "inspection."),
        ("group", "inspection."),
        ("group", "logicrd.line-2."),
        ("cluster", None),
    ]
    line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-all")["data"]["line.yaml"])
    assert line["kafka"]["bootstrap"] == ["t-logicrd-kafka-kafka-bootstrap:9093"]
    secrets = {
        volume["secret"]["secretName"]
        for volume in pods(manifests)["StatefulSet/t-logicrd-all"]["volumes"]
        if "secret" in volume
    }
    assert {"t-logicrd-kafka-cluster-ca-cert", "t-logicrd-kafka-line"} <= secrets


# --- monitoring


def test_monitoring_is_off_by_default():
    """No resource of the Prometheus operator and no dashboard."""
    assert not {"ServiceMonitor", "PrometheusRule"} & {each["kind"] for each in render()}
    assert "t-logicrd-dashboard" not in str(render())


def test_service_monitor_finds_each_service_once():
    """Workers and Triton by the ports of their services; the headless one of Triton is left out."""
    manifests = render("full-values.yaml")
    spec = one(manifests, "ServiceMonitor")["spec"]
    assert one(manifests, "ServiceMonitor")["metadata"]["labels"]["release"] == "prometheus"
    wanted = spec["selector"]["matchLabels"].items()
    found = [
        service
        for service in kinds(manifests, "Service")
        if wanted <= service["metadata"]["labels"].items()
        and service["metadata"]["labels"].get("logicrd.io/service") != "headless"
    ]
    scraped = {port["name"] for service in found for port in service["spec"]["ports"]} & {
        endpoint["port"] for endpoint in spec["endpoints"]
    }
    assert [service["metadata"]["name"] for service in found] == ["plant-triton", "plant-workers"]
    assert scraped == {"monitoring", "metrics"}


def test_rules_are_those_of_the_release():
    """Its namespace and its budget stand in every rule."""
    text = yaml.safe_dump(one(render("full-values.yaml"), "PrometheusRule")["spec"])
    assert 'namespace="logicrd"' not in text
    assert 'namespace="prod"' in text
    assert "> 1.2" in text
    assert "> 1.6" not in text
