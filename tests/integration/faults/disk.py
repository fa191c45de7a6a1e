"""A small disk for the worker, to be filled and made read-only: a tmpfs in a mount namespace of the tests' own.

The namespace goes with its last process, so that a killed test run leaves no mount. Needs root; without it there is a
plain folder, which nobody may fill.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

_CLONE_NEWNS = 0x0002_0000
_SIZE_MB = 16


def enter_namespace() -> bool:
    """Give the calling thread, and the processes that it starts from now on, mounts of their own; whether it may."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False, stderr=subprocess.DEVNULL).returncode == 0


class Disk:
    """The disk at `path`; a plain folder where there is no namespace."""

    def __init__(self, path: Path, *, mounted: bool) -> None:
        self.path = path
        self.mounted = mounted
        self.was_full = False

    @contextmanager
    def there(self) -> Iterator[None]:
        """Have it inside the block."""
        self.path.mkdir()
        if not self.mounted:
            yield
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "tmpfs", str(self.path)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self) -> None:
        """Leave no byte on it."""
        assert self.mounted, "a plain folder is not filled"
        self.was_full = True
        with (self.path / "full").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(b"\0" * size):
                        pass

    def heal(self) -> None:
        """Make it writable, and make room on it."""
        if self.mounted:
            self.remount("rw")
        (self.path / "full").unlink(missing_ok=True)

    def remount(self, mode: Literal["ro", "rw"]) -> None:
        """Make it read-only, while nobody has a file open for writing, or writable."""
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)
