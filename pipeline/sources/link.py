"""The child's end of the way by which a camera's process hands its pictures over.

Pixels go into slots of a memory file, what is said of them as JSON over a socket; the reader answers with the number of
a slot that is free again. A slot lies at a fixed place of a sparse file, so pictures may change their size at any time.
Only what a child process runs uses this; `genicam_child` speaks the same, in a Python that has none of our packages.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import numpy as np

from pipeline.types import Image

SLOTS = 3
"""Pictures on their way at once: one being looked at, one ready, one being made."""
SLOT_BYTES = 192 * 2**20
"""Distance of two slots, not their size: what is not written takes no memory."""
MAX_MESSAGE = 65_536


class Link:
    """One child's link; used by its only thread."""

    def __init__(self, link: socket.socket, memory: int) -> None:
        self._link = link
        self._memory = memory
        self._free = list(range(SLOTS))

    def settings(self) -> dict[str, Any]:
        """Take the first message, which says what to open; it may hold a password."""
        settings: dict[str, Any] = json.loads(self._link.recv(MAX_MESSAGE))
        return settings

    def say(self, message: dict[str, Any]) -> None:
        """Send a message. Raises OSError when the reader is gone."""
        self._link.send(json.dumps(message).encode())

    def picture(self, pixels: Image, head: dict[str, Any]) -> None:
        """Hand a picture over; waits for a free slot as long as the reader lives."""
        while not self._free:
            answer = self._link.recv(1)
            if not answer:
                raise ConnectionResetError("the reader is gone")
            self._free.append(answer[0])
        slot = self._free.pop()
        os.pwrite(self._memory, np.ascontiguousarray(pixels).data, slot * SLOT_BYTES)
        self.say({"kind": "picture", "slot": slot, "shape": pixels.shape, **head})
