"""Qwen3-VL and Qwen3-VL-MoE: vision tower, decoder, head. Written as if there were one device."""

from collections.abc import Iterator

from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.head import Head, LMHead, logits
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig
from titan_vlm.models.qwen3_vl.plan import tensor_plan
from titan_vlm.models.qwen3_vl.text import TextModel
from titan_vlm.models.qwen3_vl.vision import VisionTower


class Qwen3VL(nn.Module):
    """The model of the Qwen3-VL technical report (arXiv 2511.21631).

    Equal to transformers' `Qwen3VL(Moe)ForConditionalGeneration`, but for the padding and the
    masks that packed documents make needless. A stage of a pipeline is this model with None for
    the modules that other stages have.
    """

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextModel(config.text)
        self.lm_head = LMHead(config.text.hidden_size, config.text.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.text.embed.weight

    def forward(self, batch: Batch, head: Head = logits) -> Tensor:
        """`head` of the last hidden states; by default logits [B, S, V]."""
        hidden_BSD, deepstack = self.enter(batch)
        hidden_BSD = self.decode(hidden_BSD, deepstack, batch)
        return self.leave(hidden_BSD, head)

    def enter(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, S, D] of words and pictures, and a level [M, D] of vision features for
        each of the first layers."""
        features_MD, deepstack = self.vision(batch)
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
        units = [self.vision]
        if not self.config.tie_embeddings:  # a shared parameter must stay in one unit, the root
            units += [self.text.embed, self.lm_head]
        yield from (unit for unit in units if unit is not None)

    def tensor_plan(self, ranks: int) -> dict[str, list[str]]:
        """How `ranks` ranks may split each module; `parallel/tensor.py` knows the styles."""
        here = dict(self.named_modules())
        plan = tensor_plan(self.config, ranks)
        return {style: [name for name in names if name in here] for style, names in plan.items()}

    def branches(self) -> dict[str, list[str]]:
        """Parameter names of the parts that are frozen or given a learning rate by name."""
        branches: dict[str, list[str]] = {"vision": [], "projector": [], "text": []}
        for name, _ in self.named_parameters():
            if name.startswith(("vision.merger.", "vision.deepstack_mergers.")):
                branches["projector"].append(name)
            else:
                branches["vision" if name.startswith("vision.") else "text"].append(name)
        return branches
