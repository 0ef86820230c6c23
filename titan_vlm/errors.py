"""What users can get wrong. All say in one line where, what was expected and what was found.

Anything else that is raised is a defect of the program and keeps its traceback.
"""


class _OneLine(ValueError):
    """A message stays one line whatever a file name, key or value smuggles into it."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


class ConfigError(_OneLine):
    """A setting that cannot work: its key, its value, or its company."""


class DataError(_OneLine):
    """Data that cannot be used: a missing file, an unreadable sample, too many bad ones."""


class DataEnded(DataError):
    """Every source has been read as often as it may be."""


class NumericsError(_OneLine):
    """Numbers that are not finite any more, so that training on would destroy the weights."""


class CheckpointError(_OneLine):
    """Checkpoints that cannot be written any more, so that training on would be lost."""
