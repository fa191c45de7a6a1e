"""The errors a user of the model room can meet, each with the exit code its command ends with.

    TrainingError (1)
    ├── ConfigError (3)      a setting or a YAML file is wrong
    ├── DataError (3)        a picture, folder or weight file cannot be used
    └── CheckFailedError (5) a result is not what it must be, e.g. ONNX Runtime disagrees with torch

Raised everywhere in `training`, turned into one line on stderr by `cli`.
"""


class TrainingError(Exception):
    """Something went wrong that is nobody's input; exit code 1."""

    exit_code = 1


class ConfigError(TrainingError):
    """A setting or a configuration file is wrong; exit code 3."""

    exit_code = 3


class DataError(TrainingError):
    """A picture, a data folder, a bundle or a weight file cannot be used; exit code 3."""

    exit_code = 3


class CheckFailedError(TrainingError):
    """A check of a result failed, e.g. the export does not score as torch does; exit code 5."""

    exit_code = 5
