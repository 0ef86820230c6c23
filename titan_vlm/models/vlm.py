"""What the models have in common: a vision side, Qwen3's decoder with DeepStack, a head."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.head import Head, LMHead, logits
from titan_vlm.models.qwen3_vl.text import TextModel


class VLM(nn.Module):
    """A family adds `features`, `whole_plan` and `branches`. A stage of a pipeline is the model
    with None for the modules that other stages have.

    Args:
        seeing: the modules that work on patches, in their order; the last one's output are the
            features.
    """

    def __init__(self, config: Any, **seeing: nn.Module):
        super().__init__()
        self.config, self.sees_pictures = config, tuple(seeing)
        for name, module in seeing.items():
            self.add_module(name, module)
        self.text = TextModel(config.text)
        self.lm_head = LMHead(config.text.hidden_size, config.text.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.text.embed.weight

    def features(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What stands in for the visual tokens [M, D], and for each of the first layers the level
        [M, D] that is added behind it."""
        raise NotImplementedError

    def whole_plan(self, ranks: int) -> dict[str, list[str]]:
        """`tensor_plan` of the whole model."""
        raise NotImplementedError

    def branches(self) -> dict[str, list[str]]:
        """Parameter names of the parts that are frozen or given a learning rate by name."""
        raise NotImplementedError

    def forward(self, batch: Batch, head: Head = logits) -> Tensor:
        """`head` of the last hidden states; by default logits [B, S, V]."""
        hidden_BSD, deepstack = self.enter(batch)
        hidden_BSD = self.decode(hidden_BSD, deepstack, batch)
        return self.leave(hidden_BSD, head)

    def enter(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, S, D] of words and pictures, and a level [M, D] of vision features for
        each of the first layers."""
        features_MD, deepstack = self.features(batch)
        return self.text.embed_tokens(batch, features_MD), deepstack

    def decode(self, hidden_BSD: Tensor, deepstack: list[Tensor], batch: Batch) -> Tensor:
        """Through the layers."""
        return self.text.decode(hidden_BSD, deepstack, batch)

    def leave(self, hidden_BSD: Tensor, head: Head) -> Tensor:
        """From the last layer's hidden states to what `head` makes of them."""
        return self.lm_head(self.text.norm(hidden_BSD), head)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The repeated units, in the order they run, with their names."""
        if self.vision is not None:
            for i, block in self.vision.blocks.items():
                yield f"vision.blocks.{i}", block
        for i, block in self.text.layers.items():
            yield f"text.layers.{i}", block

    def sharding_units(self) -> Iterator[nn.Module]:
        """Modules whose parameters are gathered together, inner ones first."""
        for _, block in self.blocks():
            yield block
        units = [getattr(self, name) for name in self.sees_pictures]
        if not self.config.tie_embeddings:  # a shared parameter must stay in one unit, the root
            units += [self.text.embed, self.lm_head]
        yield from (unit for unit in units if unit is not None)

    def tensor_plan(self, ranks: int) -> dict[str, list[str]]:
        """How `ranks` ranks may split each module; `parallel/tensor.py` knows the styles."""
        here = dict(self.named_modules())
        plan = self.whole_plan(ranks)
        return {style: [name for name in names if name in here] for style, names in plan.items()}
