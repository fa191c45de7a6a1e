"""Secrets in the working tree, and known weaknesses of the locked packages; for `make check`.

`audit.py secrets` names each place that looks like a secret (detect-secrets; nothing leaves the machine) and is not
among the known ones of `.secrets.baseline`, which also says what is not looked at. `audit.py packages LOCK...` asks the
public database of weaknesses (pip-audit) about every package of a lock file; it installs nothing.

Exit codes: 0 nothing found, 4 the database cannot be reached or does not answer for these packages, 5 something found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detect_secrets.core import baseline
from detect_secrets.core.secrets_collection import SecretsCollection

BASELINE = ".secrets.baseline"
_TIMEOUT_S = 600
_REMEDY = (
    "take it out of the history too and change it; what is none: `detect-secrets scan --baseline .secrets.baseline`"
)


def main(argv: Sequence[str]) -> int:
    """Run one of the two; the exit code."""
    if list(argv) == ["secrets"]:
        return _say_secrets(unknown_secrets())
    if argv and argv[0] == "packages" and argv[1:]:
        return max(_say_package_faults(lock) for lock in argv[1:])
    print("usage: audit.py secrets | packages LOCK...", file=sys.stderr)
    return 2


def unknown_secrets() -> list[str]:
    """Give `path:line: kind` of each unknown secret in the files that git tracks or would take, in this folder."""
    known = baseline.load(baseline.load_from_file(BASELINE))
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")
    found = SecretsCollection()
    found.scan_files(*(name for name in names if Path(name).is_file() and name != BASELINE))
    unknown = [secret for _, secret in found - known]
    return sorted(f"{secret.filename}:{secret.line_number}: {secret.type}" for secret in unknown)


def weaknesses(document: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Read pip-audit's report: what is known of the packages, and the packages that the database does not know."""
    found, unknown = [], []
    for package in document["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for weakness in package.get("vulns", ()):
            fixed = ", ".join(weakness["fix_versions"]) or "no version yet"
            found.append(f"{package['name']} {package['version']}: {weakness['id']}, mended in {fixed}")
    return found, unknown


def _say_secrets(places: list[str]) -> int:
    for place in places:
        print(place, file=sys.stderr)
    print(f"secrets: {len(places)} found" + (f"; {_REMEDY}" if places else ""), file=sys.stderr)
    return 5 if places else 0


def _say_package_faults(lock: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "-r", lock],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return _not_audited(lock, f"no answer within {_TIMEOUT_S} s")
    try:
        document = json.loads(done.stdout)
    except ValueError:
        return _not_audited(lock, (done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    found, unknown = weaknesses(document)
    if len(unknown) == len(document["dependencies"]):
        return _not_audited(lock, "it knows none of these packages")
    for weakness in found:
        print(f"{lock}: {weakness}", file=sys.stderr)
    also = f"; not known there: {', '.join(unknown)}" if unknown else ""
    print(f"{lock}: {len(found)} known weaknesses{also}", file=sys.stderr)
    return 5 if found else 0


def _not_audited(lock: str, why: str) -> int:
    print(f"{lock}: NOT AUDITED: the database of weaknesses cannot be asked: {why}", file=sys.stderr)
    return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
