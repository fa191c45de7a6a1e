"""What the chart makes of its values for the line: files that it takes, commands that it has; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chart import CHART, CI_VALUES, ROOT, kinds, one, pods, refusal, render

from pipeline import config
from pipeline.limits import plan
from pipeline.manifest import read_manifest
from pipeline.roster import read_list

DIGEST = f"sha256:{9:064}"


def secret_files(folder: Path, line: dict) -> None:
    """Write the files that a line file names, as the mounted secrets would lie there."""
    for block in (line["kafka"], line["redis"], line["triton"], *line.get("cameras", [])):
        for part in (block, block.get("tls") or {}, block.get("sasl") or {}):
            for key, path in part.items():
                if key.endswith("_file"):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_text("secret")


@pytest.mark.parametrize("values", CI_VALUES)
def test_line_files_are_taken_by_the_line(values, tmp_path):
    """`pipeline.config.load` reads each one, with the files that its secrets are mounted as."""
    manifests = render(values)
    for workers in kinds(manifests, "StatefulSet"):
        name = workers["metadata"]["name"]
        text = one(manifests, "ConfigMap", name)["data"]["line.yaml"]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "line.yaml").write_text(text)
        secret_files(folder, yaml.safe_load(text))
        settings = config.load(folder / "line.yaml")
        assert settings.outbox.dir == Path("/var/lib/logicrd/outbox")
        assert settings.triton.models_repo == Path("/models")
        assert (settings.pool is None) is bool(settings.cameras)


@pytest.mark.parametrize("values", CI_VALUES)
def test_every_file_that_a_line_file_names_is_mounted(values):
    """Secrets, models and the volume: of each pod that reads the file, whatever it does with it."""
    manifests = render(values)
    for name, spec in pods(manifests).items():
        mounts = {each["name"]: each for each in spec["containers"][0]["volumeMounts"]}
        if "line" not in mounts:
            continue
        volumes = {each["name"]: each for each in spec["volumes"]}
        there = {"/models", "/var/lib/logicrd"}
        for volume, mount in mounts.items():
            for kind in ("secret", "configMap"):
                for item in volumes.get(volume, {}).get(kind, {}).get("items", []):
                    there.add(f"{mount['mountPath']}/{item['path']}")
            if "secret" in volumes.get(volume, {}):
                there.add(mount["mountPath"])
        line = yaml.safe_load(one(manifests, "ConfigMap", volumes["line"]["configMap"]["name"])["data"]["line.yaml"])
        for path in paths_in(line):
            full = path if path.startswith("/") else f"/etc/logicrd/{path}"
            assert any(full == place or full.startswith(f"{place}/") for place in there), (name, path)


def paths_in(node: object, key: str = "") -> list[str]:
    """Give the paths that a line file holds."""
    if isinstance(node, dict):
        return [path for name, value in node.items() for path in paths_in(value, str(name))]
    if isinstance(node, list):
        return [path for value in node for path in paths_in(value, key)]
    return [str(node)] if key.endswith("_file") or key in {"dir", "snapshot", "models_repo", "path"} else []


def test_a_worker_may_begin_without_kafka():
    """`required_at_start: false` reaches the line file of a pool that is not shared; by default Kafka is required."""
    camera = {"id": "c", "type": "usb", "product": "p", "device": "/dev/video0"}
    pools = [{"name": "a", "shared": False, "cameras": [camera]}]
    for given, expected in (({}, None), ({"required_at_start": False}, False)):
        manifests = render(overrides={"pools": pools, "config": {"kafka": given}})
        line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-a")["data"]["line.yaml"])
        assert line["kafka"].get("required_at_start") is expected


@pytest.mark.parametrize("values", CI_VALUES)
def test_commands_are_those_of_the_line(values):
    """Each container's command and every option of it is known; values are left to the command itself."""
    seen = set()
    for name, spec in pods(render(values)).items():
        container = spec["containers"][0]
        if container["command"] != ["logicrd"]:
            continue
        words = container["args"]
        verbs = tuple(word for word in words[:2] if not word.startswith("-") and "/" not in word)
        if verbs in seen:
            continue
        seen.add(verbs)
        command = [sys.executable, "-m", "pipeline.cli", *verbs, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (name, done.stderr)
        assert all(word in done.stdout for word in words if word.startswith("--")), (name, words)


def test_limits_and_cameras_are_taken_by_their_commands():
    """The files of the jobs are what `thresholds import` and `cameras apply` read."""
    data = one(render("full-values.yaml"), "ConfigMap", "plant-setup")["data"]
    manifest = read_manifest(ROOT / "models_repo", "fastener-tray")
    changes = plan(yaml.safe_load(data["thresholds.yaml"]), "file", {"fastener-tray": {}}, {"fastener-tray": manifest})
    assert [(change.product, change.ng, change.review) for change in changes] == [("fastener-tray", 4.5, 3.0)]
    listed = read_list(yaml.safe_load(data["cameras.yaml"]), "file")
    assert [entry.camera.id for entry in listed] == ["cam-1", "cam-2"]
    assert {entry.pool for entry in listed} == {"trays"}


def test_large_numbers_stay_numbers():
    """Helm writes large ones with an exponent, which YAML reads as a word: none in the line file."""
    values = {"config": {"budget_ms": 600000, "outbox": {"max_mb": 1000000}, "evidence": {"max_files": 1000000}}}
    line = yaml.safe_load(one(render(overrides=values), "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"])
    assert (line["budget_ms"], line["outbox"]["max_mb"], line["evidence"]["max_files"]) == (600000, 1000000, 1000000)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # What is missing.
        ("pools: []", "pools is empty: no cameras, no line"),
        ("pools: [{name: a}]", 'pool "a" has no cameras'),
        ("config: {line: ''}", "config.line is empty"),
        ("worker: {image: {digest: ''}}", "worker.image.digest is empty: images are named by digest"),
        ("triton: {image: {digest: ''}}", "triton.image.digest is empty"),
        ("triton: {tls: {existingSecret: ''}}", "triton.tls.existingSecret is empty"),
        ("triton: {enabled: false}", "triton.externalAddresses is empty"),
        ("triton: {modelRepository: {pvc: {claimName: ''}}}", "triton.modelRepository names 0 places"),
        ("triton: {modelRepository: {s3: {bucket: b}}}", "triton.modelRepository names 2 places (pvc, s3)"),
        ("triton: {modelRepository: {s3: {direct: true}}}", "s3.direct without s3.bucket"),
        (
            "triton: {modelRepository: {pvc: {claimName: ''}, s3: {bucket: b, endpoint: 'https://s3', direct: true}}}",
            "is not https://host:port",
        ),
        *(
            (
                "triton: {modelRepository: {pvc: {claimName: ''}, s3: {bucket: bbb, endpoint: 'https://s3:9', "
                f"prefix: {prefix}, direct: true}}}}}}",
                "with s3.direct give one of letters",
            )
            for prefix in ("''", "/line-7", "it(s)")
        ),
        ("kafka: {bootstrap: []}", "kafka.bootstrap is empty"),
        ("redis: {url: ''}", "redis.url is empty"),
        ("networkPolicy: {redis: []}", "networkPolicy.redis is empty"),
        ("networkPolicy: {cameras: {peers: []}}", "networkPolicy.cameras.peers is empty"),
        ("tracing: {address: 'collector:4317'}", "networkPolicy.tracing is empty"),
        ("tracing: {tritonUrl: 'https://collector:4318/v1/traces'}", "networkPolicy.tracing is empty"),
        # Secrets as text.
        ("redis: {password: hunter2}", "redis.password holds a secret in plain text"),
        ("kafka: {sasl: {password: hunter2}}", "kafka.sasl.password holds a secret in plain text"),
        ("redis: {url: 'rediss://u:hunter2@redis:6379/0'}", "redis.url has credentials in its address"),
        (
            "pools: [{name: a, cameras: [{id: c, type: rtsp, product: p, url: 'rtsp://u:hunter2@10.0.0.7/1'}]}]",
            "pools[0].cameras[0].url has credentials in its address",
        ),
        (
            "pools: [{name: a, cameras: [{id: c, type: rtsp, product: p, url: 'rtsp://h/1', password_file: /etc/x}]}]",
            'camera "c": password_file "/etc/x" is no file here',
        ),
        # Autoscaling without a metric source.
        ("triton: {autoscaling: {mode: keda}}", "without a metric source"),
        ("{triton: {autoscaling: {mode: hpa}}, serviceMonitor: {enabled: true}}", "without a metric source"),
        (
            "{triton: {autoscaling: {mode: hpa}}, serviceMonitor: {enabled: true}, prometheusRule: {enabled: true}}",
            "hpa without a metric source: add files/prometheus-adapter.yaml",
        ),
        (
            "{triton: {autoscaling: {mode: keda}}, serviceMonitor: {enabled: true}, prometheusRule: {enabled: true}}",
            "keda without a metric source: give triton.autoscaling.keda.prometheusAddress",
        ),
        # Plain text that was not asked for.
        ("redis: {url: 'redis://redis:6379/0'}", "is plain text: write rediss://"),
        (
            "kafka: {tls: {enabled: false}, sasl: {mechanism: PLAIN, username: u, existingSecret: s}}",
            "PLAIN sends the password as it is",
        ),
        ("kafka: {sasl: {username: u}}", "username and existingSecret go together"),
        ("triton: {signer: {configMap: a, existingSecret: b}}", "the public keys are in one of them"),
        # What cannot work.
        ("pools: [{name: a, shared: false, replicas: 2, cameras: [{id: c, type: usb, product: p, device: /dev/a}]}]",
         "is not shared and has 2 replicas"),
        ("pools: [{name: a, capacity: 1, cameras: [{id: c, type: usb, product: p, device: /dev/video0},"
         " {id: d, type: usb, product: p, device: /dev/video1}]}]", "has 2 cameras and room for 1"),
        ("pools: [{name: a, cameras: [{id: c, type: usb, product: p, device: /dev/video0},"
         " {id: c, type: usb, product: p, device: /dev/video1}]}]", 'two cameras are called "c"'),
        ("{strimzi: {enabled: true}}", "kafka.bootstrap and strimzi.enabled"),
        ("config: {kafka: {required_at_start: false}}", "is shared: its workers have their cameras from Kafka"),
        ("{config: {kafka: {required_at_start: false}}, pools: [{name: a, shared: false,"
         " stations: [{name: s, trigger: message}],"
         " cameras: [{id: c, type: usb, product: p, device: /dev/video0, station: s}]}]}",
         'station "s" triggers by message'),
        # What the schema knows.
        ("worker: {replicas: 3}", "additional properties 'replicas' not allowed"),
        ("config: {budget: 3}", "additional properties 'budget' not allowed"),
        ("pools: [{name: a, cameras: [{id: c, type: rtsp, product: p, url: 'rtsp://h/1', fps: 5}]}]",
         "additional properties 'fps' not allowed"),
        ("worker: {image: {digest: latest}}", "does not match pattern"),
        ("triton: {autoscaling: {mode: vpa}}", "value must be one of 'none', 'hpa', 'keda'"),
        ("networkPolicy: {redis: [{}]}", "minProperties"),
        ("pools: [{name: a, camerasElsewhere: true, resources: {limits: {cpu: 1, memory: 1Gi}}}]", "missing property"),
    ],
)  # fmt: skip
def test_wrong_values_end_the_render_with_a_sentence(overrides, words):
    """The sentence names the value and, but for the schema's own, what to do; no secret is repeated."""
    said = refusal(overrides)
    assert words in said, said
    assert "hunter2" not in said


def test_the_schema_knows_every_value_and_no_other():
    """draft-07, closed at every block that is the chart's own, and each key of values.yaml is in it."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    own = {name: block for name, block in schema["definitions"].items() if not name[0].isupper()}
    for name, block in (*schema["properties"].items(), *own.items()):
        if "properties" in block and name not in {"camera", "tls"}:
            assert block["additionalProperties"] is False, name
    assert schema["additionalProperties"] is False
    assert yaml.safe_load((CHART / "values.yaml").read_text()).keys() == schema["properties"].keys() - {"global"}


def test_generated_parts_are_up_to_date():
    """`make chart` would change neither the README nor the schema."""
    command = [sys.executable, str(ROOT / "deploy/local/chart.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_value_is_in_the_readme():
    """Each top value has its row, or rows for what is in it."""
    readme = (CHART / "README.md").read_text()
    for key in yaml.safe_load((CHART / "values.yaml").read_text()):
        assert f"| `{key}" in readme, key
