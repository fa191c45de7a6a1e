"""The command `logicrd` in this process, as a shell would run it."""

from __future__ import annotations

import sys

import pytest

from pipeline import cli


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int | str | None, str, str]:
    """Give exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["logicrd", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err
