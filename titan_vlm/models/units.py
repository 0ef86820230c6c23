"""What a model is cut into for a pipeline."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Modules that stay together on one stage.

    modules   their names
    cost      forward operations of one row
    levels    DeepStack levels still to be added here or later: a stage that begins with this unit
              is handed the hidden states and so many tensors of their shape
    """

    modules: tuple[str, ...]
    cost: float
    levels: int
