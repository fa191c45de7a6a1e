"""Workers, Triton, jobs and what else the chart starts: off, by default, and with each value set."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml
from chart import CHART, CI_VALUES, helm, kinds, one, pods, render, triton_of

CHECKSUM = "checksum/config"


@pytest.mark.parametrize("values", CI_VALUES)
def test_lint(values):
    """`helm lint --strict` has nothing to say of any set of values."""
    done = helm("lint", "--strict", str(CHART), values=values)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


# --- workers


def test_one_stateful_set_a_pool():
    """Each with its replicas, its selector, its line file and a volume that stays."""
    manifests = render("full-values.yaml")
    sets = {each["metadata"]["name"]: each["spec"] for each in kinds(manifests, "StatefulSet")}
    assert {name: spec["replicas"] for name, spec in sets.items()} == {"plant-trays": 2, "plant-cables": 1}
    for name, spec in sets.items():
        labels = spec["selector"]["matchLabels"]
        assert labels["logicrd.io/pool"] == name.removeprefix("plant-")
        assert labels.items() <= spec["template"]["metadata"]["labels"].items()
        assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
        assert spec["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
        line = next(volume for volume in spec["template"]["spec"]["volumes"] if volume["name"] == "line")
        assert line["configMap"]["name"] == name
        assert one(manifests, "ConfigMap", name)
    assert one(manifests, "Service", "plant-workers")["spec"]["clusterIP"] == "None"


def test_a_pools_own_place_stands_above_that_of_all():
    """`nodeSelector` and `resources` of a pool; the other pool has those of `worker`."""
    found = pods(render("full-values.yaml"))
    trays, cables = found["StatefulSet/plant-trays"], found["StatefulSet/plant-cables"]
    assert cables["nodeSelector"] == {"line": "7"}
    assert trays["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert cables["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "1Gi"}
    assert trays["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "2Gi"}
    assert trays["priorityClassName"] == cables["priorityClassName"] == "production"


def test_workers_have_time_to_drain():
    """The grace is above the line's own time for its end."""
    assert pods(render())["StatefulSet/t-logicrd-trays"]["terminationGracePeriodSeconds"] > 20
    full = pods(render("full-values.yaml"))["StatefulSet/plant-trays"]
    assert full["terminationGracePeriodSeconds"] > 30


def test_a_changed_line_file_starts_workers_anew_and_a_new_chart_does_not():
    """The checksum follows the file; no label of a pod follows the chart's version."""

    def template(**overrides):
        return one(render(overrides=overrides), "StatefulSet")["spec"]["template"]["metadata"]

    assert template()["annotations"][CHECKSUM] != template(config={"budget_ms": 1})["annotations"][CHECKSUM]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & template()["labels"].keys()


def test_worker_storage_class_and_size():
    """As given; no class by default, which takes the cluster's."""
    default = one(render(), "StatefulSet")["spec"]["volumeClaimTemplates"][0]["spec"]
    assert "storageClassName" not in default
    storage = {"size": "5Gi", "storageClassName": "fast"}
    given = one(render(overrides={"worker": {"storage": storage}}), "StatefulSet")["spec"]["volumeClaimTemplates"][0][
        "spec"
    ]
    assert given["storageClassName"] == "fast"
    assert given["resources"] == {"requests": {"storage": "5Gi"}}


def test_cameras_may_be_where_the_policy_lets_workers():
    """The line file names the policy's networks; those that are given instead; none where a peer is no network."""

    def networks(**overrides):
        line = one(render(overrides=overrides), "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"]
        return yaml.safe_load(line).get("camera_networks")

    assert networks() == ["10.0.0.0/24"]
    assert networks(config={"camera_networks": ["10.0.0.0/28"]}) == ["10.0.0.0/28"]
    pods = {"podSelector": {"matchLabels": {"app": "camera"}}}
    assert networks(networkPolicy={"cameras": {"peers": [{"ipBlock": {"cidr": "10.0.0.0/24"}}, pods]}}) is None
    assert networks(networkPolicy={"enabled": False}) is None


# --- Triton


def test_triton_is_not_made_when_it_is_somewhere_else():
    """No deployment, no service and no policy of it; the line file has the addresses."""
    manifests = render("external-plain-values.yaml")
    assert kinds(manifests, "Deployment") == []
    assert [each["metadata"]["name"] for each in kinds(manifests, "Service")] == ["t-logicrd-workers"]
    line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-desk")["data"]["line.yaml"])
    assert line["triton"]["address"] == ["triton-a.ml:8001", "triton-b.ml:8001"]
    assert "tls" not in line["triton"]


def test_traces_go_to_the_collector_and_are_off_by_default():
    """Workers by OTLP over gRPC with the authority mounted, Triton over HTTP; the policies let both out there alone."""
    manifests = render("full-values.yaml")
    line = yaml.safe_load(one(manifests, "ConfigMap", "plant-trays")["data"]["line.yaml"])
    assert line["tracing"] == {
        "address": "collector.monitoring:4317",
        "share": 0.1,
        "tls": {"ca_file": "tracing/ca/ca.crt"},
    }
    worker = pods(manifests)["StatefulSet/plant-trays"]["containers"][0]
    assert "/etc/logicrd/tracing/ca" in {mount["mountPath"] for mount in worker["volumeMounts"]}
    script = triton_of(manifests)["args"][0]
    assert "'--trace-config=opentelemetry,url=https://collector.monitoring:4318/v1/traces'" in script
    for name, port in (("plant-line", 4317), ("plant-triton", 4318)):
        rules = one(manifests, "NetworkPolicy", name)["spec"]["egress"]
        (rule,) = (rule for rule in rules if {"port": port} in rule.get("ports", []))
        assert "monitoring" in str(rule["to"])
    plain = render()
    assert "tracing" not in yaml.safe_load(one(plain, "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"])
    assert "trace-config" not in triton_of(plain)["args"][0]


def test_triton_by_default():
    """GPU, memory for /dev/shm, three probes, explicit control, and both services."""
    manifests = render()
    spec = pods(manifests)["Deployment/t-logicrd-triton"]
    container = spec["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"startupProbe", "readinessProbe", "livenessProbe", "lifecycle"} <= container.keys()
    shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]  # noqa: S108
    script = container["args"][0]
    assert "--model-control-mode=explicit" in script
    assert "'--load-model=*'" in script
    assert one(manifests, "Service", "t-logicrd-triton-headless")["spec"]["clusterIP"] == "None"
    ports = {port["port"] for port in one(manifests, "Service", "t-logicrd-triton")["spec"]["ports"]}
    assert ports == {8000, 8001, 8002}
    line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"])
    assert line["triton"]["address"] == "t-logicrd-triton-headless:8001"


@pytest.mark.parametrize(("pre_stop", "exit_timeout"), [(15, 20), (60, 120)])
def test_triton_has_time_to_end(pre_stop, exit_timeout):
    """The grace is above the pause before the stop and the time that Triton gives its requests."""
    values = {"triton": {"preStopSeconds": pre_stop, "exitTimeoutSeconds": exit_timeout}}
    spec = pods(render(overrides=values))["Deployment/t-logicrd-triton"]
    assert f"--exit-timeout-secs={exit_timeout}" in spec["containers"][0]["args"][0]
    assert spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] == pre_stop
    assert spec["terminationGracePeriodSeconds"] > pre_stop + exit_timeout


def test_triton_overrides():
    """A MIG slice, a list of models, more arguments, a runtime class, places, a larger /dev/shm."""
    spec = pods(render("full-values.yaml"))["Deployment/plant-triton"]
    container = spec["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert re.findall(r"--load-model=([^']+)", container["args"][0]) == ["fastener-tray", "cable-set"]
    assert container["args"][0].rstrip().endswith("'--log-verbose=0'")
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["sizeLimit"] == "2Gi"


def test_no_gpu():
    """`gpu.count: 0` asks for none."""
    limits = triton_of(render(overrides={"triton": {"gpu": {"count": 0}}}))["resources"]["limits"]
    assert limits.keys() == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("values", "overrides", "source", "sub_path"),
    [
        ("default-values.yaml", None, {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}, None),
        (
            "default-values.yaml",
            {"triton": {"modelRepository": {"pvc": {"subPath": "live"}}}},
            {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
            "live",
        ),
        (
            "hpa-image-values.yaml",
            None,
            {"image": {"reference": f"registry.example/models@sha256:{4:064}", "pullPolicy": "IfNotPresent"}},
            "models_repo",
        ),
        ("full-values.yaml", None, {"emptyDir": {"sizeLimit": "10Gi"}}, None),
    ],
)
def test_every_pod_reads_the_same_models(values, overrides, source, sub_path):
    """A claim, an image or a bucket: Triton, workers, jobs and tests mount it at /models, and only a copy writes it."""
    for name, spec in pods(render(values, overrides)).items():
        volume = next(volume for volume in spec["volumes"] if volume["name"] == "models")
        assert {key: value for key, value in volume.items() if key != "name"} == source, name
        mount = next(each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "models")
        assert mount["mountPath"] == "/models"
        assert mount["readOnly"] is True
        assert mount.get("subPath") == sub_path
        copies = [each["image"].partition("@")[0] for each in spec.get("initContainers", [])]
        assert copies == (["docker.io/rclone/rclone"] if "emptyDir" in source else []), name


def test_a_bucket_is_read_with_credentials_from_a_file():
    """The key is in no argument and no variable; who vouches for the server comes from a file too."""
    copy = pods(render("full-values.yaml"))["Deployment/plant-triton"]["initContainers"][0]
    variables = {each["name"]: each["value"] for each in copy["env"]}
    assert variables["AWS_SHARED_CREDENTIALS_FILE"] == "/etc/s3/credentials"
    assert variables["RCLONE_CA_CERT"] == "/etc/s3-authority/ca.crt"
    assert {"/etc/s3", "/etc/s3-authority"} < {mount["mountPath"] for mount in copy["volumeMounts"]}
    assert variables["RCLONE_S3_ENDPOINT"] == "https://minio.data:9000"
    assert copy["args"][1] == ":s3:models/line-7"


def test_a_bucket_can_be_read_without_a_copy():
    """Triton and the line file name the same bucket; each container that reads it has the files of key and authority,
    and no pod copies or mounts models."""
    manifests = render("full-values.yaml", {"triton": {"modelRepository": {"s3": {"direct": True}}}})
    address = "s3://https://minio.data:9000/models/line-7"
    assert f"--model-repository={address} " in triton_of(manifests)["args"][0]
    lines = [yaml.safe_load(each["data"]["line.yaml"]) for each in manifests if "line.yaml" in each.get("data", {})]
    assert {line["triton"]["models_repo"] for line in lines} == {address}
    for name, spec in pods(manifests).items():
        assert "initContainers" not in spec, name
        assert "models" not in [volume["name"] for volume in spec["volumes"]], name
        container = spec["containers"][0]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables["AWS_SHARED_CREDENTIALS_FILE"] == "/etc/s3/credentials", name
        assert variables["AWS_CA_BUNDLE"] == "/etc/s3-authority/ca.crt", name
        assert {"/etc/s3", "/etc/s3-authority"} < {mount["mountPath"] for mount in container["volumeMounts"]}, name
    mounts = {mount["mountPath"]: mount for mount in triton_of(manifests)["volumeMounts"]}
    authority = {"name": "s3-authority", "subPath": "ca.crt", "readOnly": True}
    place = "/etc/ssl/certs/ca-certificates.crt"  # where test_triton_serves_a_bucket proves that Triton looks
    assert mounts[place] == authority | {"mountPath": place}


def test_a_bucket_of_a_known_authority_needs_no_file_of_it():
    """Without `caSecret` nothing takes the place of the images' own authorities."""
    for direct in (True, False):
        source = {"s3": {"direct": direct, "caSecret": ""}}
        manifests = render("full-values.yaml", {"triton": {"modelRepository": source}})
        for absent in ("s3-authority", "AWS_CA_BUNDLE", "RCLONE_CA_CERT", "ca-certificates.crt"):
            assert absent not in str(manifests)


def test_triton_by_tls_and_without():
    """By default gRPC has the certificate of the secret, and the workers its authority; off, neither."""
    manifests = render()
    assert "--grpc-use-ssl=true" in triton_of(manifests)["args"][0]
    line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"])
    assert line["triton"]["tls"] == {"ca_file": "triton/ca/ca.crt"}
    worker = pods(manifests)["StatefulSet/t-logicrd-trays"]
    secrets = [volume["secret"] for volume in worker["volumes"] if "secret" in volume]
    assert [secret["items"] for secret in secrets if secret["secretName"] == "triton-tls"] == [
        [{"key": "ca.crt", "path": "ca.crt"}]
    ]
    plain = render(overrides={"triton": {"tls": {"enabled": False, "existingSecret": ""}}})
    assert "ssl" not in triton_of(plain)["args"][0]
    assert "triton-tls" not in str(plain)


def test_tritons_dangerous_calls_ask_for_a_key():
    """gRPC restricts what changes the server, HTTP everything but health; the key is a random one, or of the secret."""
    script = triton_of(render())["args"][0]
    grpc = re.search(r'--grpc-restricted-protocol="([^:]+):', script)
    http = re.search(r'--http-restricted-api="([^:]+):', script)
    assert grpc is not None
    assert http is not None
    assert set(grpc[1].split(",")) == {"model-repository", "shared-memory", "logging", "trace"}
    everything = {"metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics", "trace"}
    assert set(http[1].split(",")) == everything | {"logging"}
    assert "admin" not in [volume["name"] for volume in pods(render())["Deployment/t-logicrd-triton"]["volumes"]]
    given = pods(render("full-values.yaml"))["Deployment/plant-triton"]
    admin = next(volume for volume in given["volumes"] if volume["name"] == "admin")
    assert admin["secret"]["secretName"] == "triton-admin"


def test_workers_take_what_the_signer_signed():
    """The public keys of a ConfigMap or a Secret are a file that the line file names; by default there are none."""
    source = {"defaultMode": 0o440, "items": [{"key": "keys", "path": "signer.pem"}]}
    for signer, expected in (
        ({"configMap": "signers", "key": "keys"}, {"configMap": {"name": "signers", **source}}),
        ({"existingSecret": "signers", "key": "keys"}, {"secret": {"secretName": "signers", **source}}),
    ):
        manifests = render(overrides={"triton": {"signer": signer}})
        line = yaml.safe_load(one(manifests, "ConfigMap", "t-logicrd-trays")["data"]["line.yaml"])
        assert line["triton"]["signer_file"] == "triton/signer/signer.pem"
        worker = pods(manifests)["StatefulSet/t-logicrd-trays"]
        mounts = {mount["mountPath"]: mount["name"] for mount in worker["containers"][0]["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in worker["volumes"]}
        assert volumes[mounts["/etc/logicrd/triton/signer"]] == expected
    assert "signer" not in str(render())


# --- jobs


def test_jobs_do_what_the_values_ask_for():
    """Topics by default; limits and cameras where they are given; none where topics are made elsewhere."""

    def commands(values):
        return sorted(job["spec"]["template"]["spec"]["containers"][0]["name"] for job in kinds(render(values), "Job"))

    assert commands("default-values.yaml") == ["cameras", "topics"]
    assert commands("full-values.yaml") == ["cameras", "thresholds", "topics"]
    assert commands("hpa-image-values.yaml") == ["topics"]
    assert commands("external-plain-values.yaml") == []


def test_a_changed_job_has_another_name():
    """A job that is there cannot be changed; the same values give the same name."""

    def names(**overrides):
        return {job["metadata"]["name"] for job in kinds(render(overrides=overrides), "Job")}

    assert names() == names(triton={"replicas": 3})
    assert len(names() & names(kafka={"topics": {"partitions": 7}})) == 1


# --- account, test, notes


def test_service_account():
    """Made without a token by default; one that is there by its name; the namespace's own when none is made."""
    assert one(render(), "ServiceAccount")["automountServiceAccountToken"] is False
    assert kinds(render("external-plain-values.yaml"), "ServiceAccount") == []
    given = render(overrides={"serviceAccount": {"create": False, "name": "ours"}})
    assert {spec["serviceAccountName"] for spec in pods(given).values()} == {"ours"}


def test_helm_test_judges_a_picture():
    """One pod a pool, run by `helm test` alone."""
    tests = kinds(render("full-values.yaml"), "Pod")
    assert [pod["metadata"]["name"] for pod in tests] == ["plant-trays-test", "plant-cables-test"]
    for pod in tests:
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert pod["spec"]["containers"][0]["args"][-1] == "--verdict"


def test_names_and_labels_as_given():
    """`fullnameOverride`, `commonLabels` and `imagePullSecrets` reach every object and pod."""
    manifests = render("full-values.yaml")
    assert all(each["metadata"]["name"].startswith("plant") for each in manifests)
    assert all(each["metadata"]["labels"]["team"] == "inspection" for each in manifests)
    assert all(spec["imagePullSecrets"] == [{"name": "registry"}] for spec in pods(manifests).values())


def test_notes_show_the_first_verdict_in_three_commands(tmp_path):
    """Each names what is there. Without a cluster helm renders no notes: here they are an object of a copy."""
    copy = tmp_path / "logicrd"
    shutil.copytree(CHART, copy)
    notes = (copy / "templates/NOTES.txt").read_text()
    wrapped = 'kind: Notes\nmetadata: {name: notes}\ntext: {{ include "notes" . | quote }}\n'
    (copy / "templates/notes.yaml").write_text(f'{{{{ define "notes" }}}}{notes}{{{{ end }}}}{wrapped}')
    done = helm("template", "t", str(copy), "-n", "prod")
    assert done.returncode == 0, done.stderr
    text = one([each for each in yaml.safe_load_all(done.stdout) if each], "Notes")["text"]
    assert [line.strip() for line in text.splitlines() if line.startswith("  ")] == [
        "kubectl -n prod rollout status statefulset/t-logicrd-trays --timeout=15m",
        "helm -n prod test t --logs",
        "kubectl -n prod exec t-logicrd-trays-0 -- logicrd verdicts tail -c /etc/logicrd/line.yaml --from-start",
    ]
