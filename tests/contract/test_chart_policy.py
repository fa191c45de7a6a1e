"""The rendered objects against Kubernetes' own schemas and the pod security level `restricted`."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest
import yaml
from chart import CI_VALUES, KUBERNETES, kinds, one, pods, render

CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "Kafka", "KafkaNodePool", "KafkaUser"}
# https://kubernetes.io/docs/concepts/security/pod-security-standards, and the source of an OCI image, which came later.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", CI_VALUES)
def test_objects_are_what_kubernetes_takes(values, version):
    """Strictly: no unknown field, every required one, each of its kind."""
    checked = 0
    for manifest in render(values):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked >= 4


def test_the_schemas_refuse_what_is_wrong():
    """The check above can fail: a misspelt field is refused."""
    manifest = one(render(), "Deployment")
    spoilt = yaml.safe_load(
        yaml.safe_dump(manifest).replace("terminationGracePeriodSeconds", "terminationGraceSeconds")
    )
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoilt, KUBERNETES[-1], strict=True)


def containers(spec):
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("values", CI_VALUES)
def test_pods_are_restricted(values):
    """No root, no token, nothing of the node, no other kind of volume, no writable root folder, no capability."""
    found = pods(render(values))
    assert found
    for name, spec in found.items():
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] >= 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for volume in spec.get("volumes", []):
            assert (volume.keys() - {"name"}) <= VOLUMES | {"image"}, (name, volume)
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert not any("hostPort" in port for port in container.get("ports", []))


@pytest.mark.parametrize("values", CI_VALUES)
def test_containers_have_limits_and_their_places_to_write(values):
    """CPU and memory asked for and bounded; /tmp is a bounded volume; memory for /dev/shm fits in the limit."""
    for name, spec in pods(render(values)).items():
        for container in containers(spec):
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][bound].keys(), name
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], name  # noqa: S108
        for volume in spec["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], (name, volume)


@pytest.mark.parametrize("values", CI_VALUES)
def test_servers_have_probes(values):
    """Start-up, readiness and liveness, each at a port that the container names."""
    manifests = render(values)
    for each in (*kinds(manifests, "StatefulSet"), *kinds(manifests, "Deployment")):
        for container in each["spec"]["template"]["spec"]["containers"]:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["port"] in ports


@pytest.mark.parametrize("values", CI_VALUES)
def test_images_are_named_by_digest(values):
    """Of containers and of volumes; no tag."""
    for name, spec in pods(render(values)).items():
        images = [container["image"] for container in containers(spec)]
        images += [volume["image"]["reference"] for volume in spec["volumes"] if "image" in volume]
        for image in images:
            assert re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", image), (name, image)


@pytest.mark.parametrize("values", CI_VALUES)
def test_no_secret_is_made_or_written_out(values):
    """No Secret, no variable from one, and nothing in a ConfigMap but paths of them."""
    manifests = render(values)
    assert kinds(manifests, "Secret") == []
    for spec in pods(manifests).values():
        for container in containers(spec):
            assert "envFrom" not in container
            assert all("valueFrom" not in variable for variable in container.get("env", []))
    for config in kinds(manifests, "ConfigMap"):
        for line in "\n".join(config["data"].values()).splitlines():
            if re.search(r"(?i)\b(password|token|secret)\w*:", line):
                assert re.search(r"password_file: \S+/\S+$", line.strip()), line


@pytest.mark.parametrize("values", CI_VALUES)
def test_mounts_have_volumes_and_places_of_their_own(values):
    """Every mount names a volume or a claim, and no two lie at one place."""
    manifests = render(values)
    claims = {
        each["metadata"]["name"]
        for sets in kinds(manifests, "StatefulSet")
        for each in sets["spec"]["volumeClaimTemplates"]
    }
    for name, spec in pods(manifests).items():
        volumes = [volume["name"] for volume in spec["volumes"]]
        assert len(volumes) == len(set(volumes)), name
        for container in containers(spec):
            mounts = container["volumeMounts"]
            assert {mount["name"] for mount in mounts} <= {*volumes, *claims}, name
            places = [mount["mountPath"] for mount in mounts]
            assert len(places) == len(set(places)), name
