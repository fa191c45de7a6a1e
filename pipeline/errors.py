"""Every error the line raises on purpose, as one tree.

    LineError                    exit 1   our fault, unless a subclass says otherwise
    ├── ConfigError              exit 3   the line file, a manifest or a named product is wrong
    ├── DependencyError          exit 4   Triton, Kafka or Redis cannot be reached or refuses us; or no DeepStream
    ├── CheckError               exit 5   something answered, but is not what it has to be
    │   └── ModelMismatchError   exit 5   Triton's signature is not the manifest's
    └── SourceError              no exit  a camera or a picture; the supervisor turns it into a state or a verdict
        └── FrameError           no exit  one picture could not be used; the camera goes on

Lower libraries' errors are mapped at the module that talks to them and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import ValidationError


class LineError(Exception):
    """A message for the operator: what, which one, and what to do (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LineError):
    """A file that the user writes or names is wrong; nothing was started."""

    exit_code = 3


class DependencyError(LineError):
    """What the line needs beside itself is not there: a server that does not answer or refuses, or DeepStream."""

    exit_code = 4


class CheckError(LineError):
    """A check or a gate failed: the parts are there and do not fit."""

    exit_code = 5


class ModelMismatchError(CheckError):
    """Triton serves another network than the manifest describes."""


class SourceError(LineError):
    """A camera cannot be opened or read. `reason` is a short code for metrics and status events.

    `final` says that trying again cannot help (a file that does not exist); the reader then stops.
    """

    def __init__(self, message: str, *, reason: str, hint: str = "", final: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.final = final


class FrameError(SourceError):
    """One picture is unusable (cut, corrupt, too large, of another size): its part is UNINSPECTED.

    `trigger_count` is the camera's count of it, as in `Picture`: it came, though damaged, and is no gap. The `reason`
    `no_key_frame` is that of a stream joined too late to show the frame: only one that names its part was due.
    """

    def __init__(
        self,
        message: str,
        *,
        part_id: str | None = None,
        part_id_source: str | None = None,
        trigger_count: int | None = None,
        reason: Literal["frame_corrupt", "no_key_frame"] = "frame_corrupt",
    ) -> None:
        super().__init__(message, reason=reason)
        self.part_id = part_id
        self.part_id_source = part_id_source
        self.trigger_count = trigger_count


def first_fault(error: ValidationError, whole: str = "") -> str:
    """Say the first thing that is wrong with a document, and where: `a.b: why`.

    `whole` names the document where the fault has no place in it.
    """
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in fault["loc"]) or whole
    return f"{place}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
