"""What users can get wrong. All say in one line where, what was expected and what was found.

Anything else that is raised is a defect of the program and keeps its traceback.
"""

LONGEST = 2000  # characters of a message


class UserError(ValueError):
    """Any of those below. A message stays one printable line, not too long, whatever a file name,
    key or value smuggles into it (a terminal obeys control characters)."""

    def __init__(self, message: str):
        text = str(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        shown = (c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))
        super().__init__("".join(shown))


class ConfigError(UserError):
    """A setting that cannot work: its key, its value, or its company."""


class DataError(UserError):
    """Data that cannot be used: a missing file, an unreadable sample, too many bad ones."""


class DataEnded(DataError):
    """Every source has been read as often as it may be."""


class NumericsError(UserError):
    """Numbers that are not finite any more, so that training on would destroy the weights."""


class CheckpointError(UserError):
    """Checkpoints that cannot be written any more, so that training on would be lost."""


class ReadError(OSError):
    """Storage still fails after it was tried again: no fault of a sample, nor of the user. The
    trainer tells it to all ranks as a DataError."""
