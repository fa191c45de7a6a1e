"""Signatures of manifests: Ed25519, made and checked by the system's `openssl`, which spares the line a library.

A signature lies beside the manifest as `manifest.json.sig`, 64 bytes, over the manifest's bytes; the manifest in turn
holds the hash of every file. A private key is read by `openssl` alone. Called by `model_repository` and the commands.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.errors import CheckError, ConfigError

SUFFIX = ".sig"
_TIMEOUT_S = 60.0  # a key with a passphrase asks for it on the terminal


def sign(manifest: Path, key: Path) -> Path:
    """Write the signature beside a manifest and give its path. Raises ConfigError when the key is none of Ed25519."""
    kind = _openssl("pkey", "-in", str(key), "-noout", "-text")
    if kind.returncode or b"ED25519" not in kind.stdout.upper():
        raise ConfigError(
            f"{key}: no private key of Ed25519", hint="`openssl genpkey -algorithm ed25519 -out key.pem` makes one"
        )
    path = manifest.with_name(manifest.name + SUFFIX)
    run = _openssl("pkeyutl", "-sign", "-rawin", "-inkey", str(key), "-in", str(manifest), "-out", str(path))
    if run.returncode:
        raise CheckError(f"{manifest}: not signed: {_last(run.stderr)}")
    return path


def fault_of_signature(manifest: Path, signer: Path) -> str:
    """Say what is wrong with a manifest's signature; '' when `signer`, a public key in PEM, made it."""
    signature = manifest.with_name(manifest.name + SUFFIX)
    if not signature.is_file():
        return f"{manifest.name} is not signed, and `triton.signer_file` asks for a signature"
    files = ("-inkey", str(signer), "-in", str(manifest), "-sigfile", str(signature))
    run = _openssl("pkeyutl", "-verify", "-rawin", "-pubin", *files)
    return "" if run.returncode == 0 else f"{signature.name} is not a signature of {manifest.name} by {signer}"


def _openssl(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["openssl", *arguments], capture_output=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ConfigError("openssl is not there", hint="install it (Debian: apt-get install openssl)") from None
    except subprocess.TimeoutExpired:
        raise CheckError(f"openssl {arguments[0]} did not end within {_TIMEOUT_S:.0f} s") from None


def _last(words: bytes) -> str:
    lines = words.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "openssl gave no reason"
