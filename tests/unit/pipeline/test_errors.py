"""The error tree: what each branch means for the exit code."""

import inspect

import pytest

from pipeline import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.LineError, 1),
        (errors.ConfigError, 3),
        (errors.DependencyError, 4),
        (errors.CheckError, 5),
        (errors.ModelMismatchError, 5),
    ],
)
def test_each_branch_has_its_exit_code(kind, code):
    """The exit codes are those of the documentation."""
    assert kind("what went wrong").exit_code == code


def test_every_error_is_in_the_drawing_and_in_the_tree():
    """Every error is a LineError, and the module's drawing names it."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(kind, errors.LineError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_one_bad_picture_is_no_lost_camera():
    """A FrameError carries the part it happened to, and never ends the camera."""
    error = errors.FrameError("cut", part_id="p-1", part_id_source="file")
    assert (error.reason, error.final, error.part_id, error.part_id_source) == ("frame_corrupt", False, "p-1", "file")
