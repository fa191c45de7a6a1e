"""Keys that sign manifests, made by openssl as a site would make them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair of Ed25519; the files of its private and its public half."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public
