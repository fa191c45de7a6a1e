"""What `make check` finds besides lint and types: secrets in the tree, weaknesses of the packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit import BASELINE, weaknesses

ROOT = Path(__file__).resolve().parents[2]
AUDIT = ROOT / "deploy/local/audit.py"
# In pieces, so that this file holds none.
PLANTED = {
    "deploy/values.yaml": 'password: "' + "Tr4y-7-Inspector" + '"\n',
    "keys/line.key": "-----BEGIN " + "PRIVATE KEY-----\nMIIEvQIBADANBg\n",
    "pipeline/camera.py": 'URL = "rtsp://admin:' + 'Kj38dkLq2x@10.0.0.7/a"\n',
    "upload.py": 'KEY = "AKIA' + 'Z3MHALF2TESTHALF"\n',
}


def audit(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(AUDIT), *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def tree(tmp_path):
    """A repository with nothing in it but the known secrets' list of this one."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=30)
    shutil.copy(ROOT / BASELINE, tmp_path)
    (tmp_path / ".gitignore").write_text("ignored/\n")
    return tmp_path


def test_planted_secrets_are_found(tree):
    """Of each kind, in files that are not even committed; each is named by its place, and none of them is repeated."""
    for name, text in PLANTED.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("first: line\n" + text)
    (tree / "ignored").mkdir()
    (tree / "ignored/upload.py").write_text(PLANTED["upload.py"])
    done = audit(tree, "secrets")
    assert done.returncode == 5
    assert {line.split(": ")[0] for line in done.stderr.splitlines()[:-1]} == {f"{name}:2" for name in PLANTED}
    assert "Tr4y" not in done.stderr


def test_a_tree_without_secrets_passes(tree):
    """Addresses, digests and names of secrets are none."""
    (tree / "line.yaml").write_text("url: rtsps://10.0.0.7/a\nuser: line\npassword_file: cameras/line-1/cam-1\n")
    done = audit(tree, "secrets")
    assert (done.returncode, done.stderr) == (0, "secrets: 0 found\n")


def test_a_known_weakness_and_an_unknown_package_are_named():
    """With the version that mends it; a package that the database does not know is not taken for a good one."""
    weak = {"id": "PYSEC-2026-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
    document = {
        "dependencies": [
            {"name": "good", "version": "1", "vulns": []},
            {"name": "weak", "version": "2.0", "vulns": [weak, {**weak, "id": "PYSEC-2026-2", "fix_versions": []}]},
            {"name": "own", "skip_reason": "not found"},
        ]
    }
    assert weaknesses(document) == (
        ["weak 2.0: PYSEC-2026-1, mended in 2.1", "weak 2.0: PYSEC-2026-2, mended in no version yet"],
        ["own"],
    )


def test_an_audit_that_cannot_be_made_says_so(tmp_path):
    """No answer is not taken for a good one: a plain line, and exit code 4."""
    (tmp_path / "lock.txt").write_text("numpy==2.4.6 --hash=sha256:" + "0" * 64 + "\n")
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(AUDIT), "packages", "lock.txt"],
        cwd=tmp_path, env=unreachable, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "lock.txt: NOT AUDITED" in done.stderr
    assert "Traceback" not in done.stderr
