"""The ranks that hold other tokens of the same micro-batch, as a layer sees them."""

from torch import Tensor


class Alone:
    """There are none. `parallel/expert.py` has those of a process group."""

    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks, a new tensor; without gradients."""
        return x

    def gather(self, *columns_P: Tensor) -> tuple[list[Tensor], slice]:
        """The rows of all ranks, however many each has, in the order of the ranks, of each column;
        and which of them are this rank's. Without gradients."""
        return list(columns_P), slice(None)
