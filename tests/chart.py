"""The chart as helm renders it, for the tests of it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm/logicrd"
HELM = ROOT / ".cache/bin/helm"
PROMTOOL = ROOT / ".cache/bin/promtool"
CI_VALUES = sorted(path.name for path in (CHART / "ci").glob("*-values.yaml"))
KUBERNETES = ("1.35", "1.36", "1.37")
NAMESPACE = "prod"

Manifest = dict[str, Any]


def helm(*arguments: str, values: str = "default-values.yaml", overrides: str = "") -> subprocess.CompletedProcess[str]:
    """Run helm on the chart with a file of `ci/` and further values, as YAML, above it."""
    version = f"{KUBERNETES[-1]}.0"
    command = [str(HELM), *arguments, "--kube-version", version, "-f", str(CHART / "ci" / values), "-f", "-"]
    return subprocess.run(command, input=overrides or "{}", capture_output=True, text=True, timeout=120, check=False)


@cache
def _rendered(values: str, overrides: str) -> str:
    done = helm("template", "t", str(CHART), "-n", NAMESPACE, values=values, overrides=overrides)
    if done.returncode:
        raise AssertionError(done.stderr)
    return done.stdout


def render(values: str = "default-values.yaml", overrides: dict[str, Any] | None = None) -> list[Manifest]:
    """Give the objects that the chart makes of values; `overrides` lie above the file of `ci/`."""
    text = _rendered(values, yaml.safe_dump(overrides) if overrides else "")
    return [document for document in yaml.safe_load_all(text) if document is not None]


def refusal(overrides: str, values: str = "default-values.yaml") -> str:
    """Give helm's words for values that it must not render."""
    done = helm("template", "t", str(CHART), "-n", NAMESPACE, values=values, overrides=overrides)
    assert done.returncode != 0, "the chart rendered"
    return done.stderr


def kinds(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Give the objects of a kind."""
    return [each for each in manifests if each["kind"] == kind]


def one(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """Give the only object of a kind, or that of a name."""
    found = [each for each in kinds(manifests, kind) if name in ("", each["metadata"]["name"])]
    assert len(found) == 1, [each["metadata"]["name"] for each in kinds(manifests, kind)]
    return found[0]


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Give the specification of every pod, by the kind and name of what makes it."""
    found = {}
    for each in manifests:
        spec = each["spec"] if each["kind"] == "Pod" else each.get("spec", {}).get("template", {}).get("spec", {})
        if "containers" in spec:
            found[f"{each['kind']}/{each['metadata']['name']}"] = spec
    return found


def triton_of(manifests: list[Manifest]) -> Manifest:
    """Give Triton's container."""
    container: Manifest = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container
