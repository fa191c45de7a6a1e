"""Signatures of manifests: Ed25519, made and checked by the system's `openssl`, which spares the line a library.

A signature lies beside the manifest as `manifest.json.sig`, 64 bytes, over the manifest's bytes; the manifest in turn
holds the hash of every file. A private key is read by `openssl` alone. Called by `manifest` and `rollouts` for the
line, by `model_repository` and the commands.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckError, ConfigError

SUFFIX = ".sig"
_TIMEOUT_S = 60.0  # a key with a passphrase asks for it on the terminal
_NEW_KEY = "`openssl genpkey -algorithm ed25519 -out key.pem` makes a private one"
_PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n?", re.DOTALL)


def sign(manifest: Path, key: Path) -> Path:
    """Write the signature beside a manifest and give its path. Raises ConfigError when the key is none of Ed25519."""
    if not _is_ed25519("-in", str(key)):
        raise ConfigError(f"{key}: no private key of Ed25519", hint=_NEW_KEY)
    path = manifest.with_name(manifest.name + SUFFIX)
    run = _openssl("pkeyutl", "-sign", "-rawin", "-inkey", str(key), "-in", str(manifest), "-out", str(path))
    if run.returncode:
        raise CheckError(f"{manifest}: not signed: {_last(run.stderr)}")
    return path


def read_signature(manifest: Path) -> bytes | None:
    """Read the signature beside a manifest; None when there is none. Raises ConfigError."""
    path = manifest.with_name(manifest.name + SUFFIX)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def fault_of_signature(manifest: bytes, signature: bytes | None, signer: Path) -> str:
    """Say what is wrong with the signature of a manifest's bytes; '' when one of the public keys in `signer` made it.

    Blocks for some milliseconds a key. Raises ConfigError when `signer` cannot be read or holds no public key in PEM,
    and where none of them made it and one could not, being of another kind.
    """
    keys, unusable = _keys(signer), False
    if signature is None:
        return "not signed, and `triton.signer_file` asks for a signature"
    with _in_memory(manifest) as signed, _in_memory(signature) as made:
        for key in keys:
            with _in_memory(key) as public:
                files = ("-inkey", public.path, "-in", signed.path, "-sigfile", made.path)
                held = (public.number, signed.number, made.number)
                if _openssl("pkeyutl", "-verify", "-rawin", "-pubin", *files, held=held).returncode == 0:
                    return ""
                unusable |= not _is_ed25519("-pubin", "-in", public.path, held=[public.number])
    if unusable:
        raise ConfigError(f"triton.signer_file {signer}: holds a key that is none of Ed25519", hint=_NEW_KEY)
    return f"not signed by a key of {signer}"


def _keys(signer: Path) -> list[bytes]:
    try:
        keys = _PUBLIC_KEY.findall(signer.read_bytes())
    except OSError as error:
        raise ConfigError(f"triton.signer_file {signer}: {error.strerror}") from None
    if not keys:
        raise ConfigError(
            f"triton.signer_file {signer}: no public key in PEM",
            hint="`openssl pkey -in key.pem -pubout` prints that of a private one",
        )
    return keys


def _is_ed25519(*key: str, held: Sequence[int] = ()) -> bool:
    kind = _openssl("pkey", "-noout", "-text", *key, held=held)
    return kind.returncode == 0 and b"ED25519" in kind.stdout.upper()


@dataclass(frozen=True, slots=True)
class _Held:
    """A file that has no name but the number of its descriptor: what was read is what `openssl` checks."""

    number: int

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.number}"


@contextmanager
def _in_memory(content: bytes) -> Iterator[_Held]:
    with os.fdopen(os.memfd_create("logicrd"), "wb") as file:
        file.write(content)
        file.flush()
        yield _Held(file.fileno())


def _openssl(*arguments: str, held: Sequence[int] = ()) -> subprocess.CompletedProcess[bytes]:
    """Run it; `held` are the descriptors that it shall have."""
    command = ["openssl", *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False, pass_fds=held)
    except FileNotFoundError:
        raise ConfigError("openssl is not there", hint="install it (Debian: apt-get install openssl)") from None
    except subprocess.TimeoutExpired:
        raise CheckError(f"openssl {arguments[0]} did not end within {_TIMEOUT_S:.0f} s") from None


def _last(words: bytes) -> str:
    lines = words.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "openssl gave no reason"
