"""The `config.json` of a Hugging Face directory, read with errors in the reader's words."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from titan_vlm.errors import ConfigError

T = TypeVar("T")


def read_config_json(directory: str | Path, translate: Callable[[dict[str, Any]], T]) -> T:
    """What `translate` makes of the file's content.

    Raises:
        ConfigError: there is no such file, it is no JSON object, or `translate` refuses it or meets
            a missing key or a value of a wrong type; names the directory.
    """
    try:
        content = json.loads((Path(directory) / "config.json").read_text())
        if not isinstance(content, dict):
            raise ConfigError("config.json is no JSON object")
        return translate(content)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{directory}: config.json: key {error} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{directory}: config.json cannot be read: {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{directory}: config.json has a value of a wrong type: {error}"
        ) from error


def require(holds: bool, message: str) -> None:
    """Raises: ConfigError with `message`, about what a file asks for and no model here has."""
    if not holds:
        raise ConfigError(
            f"config.json: {message}; this model computes nothing else: choose another checkpoint"
        )


def checked(made: T) -> T:
    """A dataclass of dimensions as it is.

    Raises:
        ConfigError: a number, bool or string that is of another type; names the field.
    """
    for f in fields(made):
        value = getattr(made, f.name)
        accepted = (int, float) if f.type is float else f.type
        is_bool_for_number = isinstance(value, bool) and f.type is not bool
        if f.type not in (int, float, bool, str):
            continue
        if is_bool_for_number or not isinstance(value, accepted):
            raise ConfigError(f"config.json: {f.name} must be a {f.type.__name__}, got {value!r}")
    return made
