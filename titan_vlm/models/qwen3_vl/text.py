"""The decoder of Qwen3-VL and Qwen3-VL-MoE.

Hidden states keep the shape [B, S, D]; attention and experts see the rows flattened to [T, D],
T = B * S. DeepStack (Meng et al. 2024, arXiv 2406.04334): the first layers each add one level of
vision features to the visual tokens' hidden states.
"""

from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.attention import Documents, Dropout, attend
from titan_vlm.models.layers.mlp import SwiGLU
from titan_vlm.models.layers.rope import rotate, text_tables
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Moment, Tokens
from titan_vlm.models.qwen3_vl.config import TextConfig


class TextModel(nn.Module):
    """Embedding, blocks and final norm; `Qwen3VL` calls its two halves."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_layers)})
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def embed_tokens(self, batch: Batch, features_MD: Tensor) -> Tensor:
        """[B, S, D]; `features_MD` stand in for the embeddings of the visual tokens."""
        x_BSD = self.embed(batch.tokens_BS)
        x_TD = x_BSD.flatten(0, 1).index_copy(0, batch.visual_index_M, features_MD)
        return x_TD.view_as(x_BSD)

    def decode(self, x_BSD: Tensor, deepstack: list[Tensor], batch: Batch) -> Tensor:
        """Hidden states [B, S, D] after the blocks.

        Args:
            deepstack: [M, D] for each of the first layers.
        """
        config, where_M = self.config, batch.visual_index_M
        keys = batch.doc_keys if config.attention_dropout else None
        documents = Documents(batch.doc_lens, keys)
        cos, sin = text_tables(
            batch.positions_3BS.flatten(1),
            config.head_dim,
            config.rope_theta,
            config.mrope_section,
            x_BSD.dtype,
        )
        for name, block in self.layers.items():
            x_BSD = block(x_BSD, cos, sin, documents, batch.tokens)
            if int(name) < len(deepstack):
                x_TD = x_BSD.flatten(0, 1).index_add(0, where_M, deepstack[int(name)])
                x_BSD = x_TD.view_as(x_BSD)
        return x_BSD


class Block(nn.Module):
    """Pre-norm decoder block, with experts or dense."""

    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        width = config.hidden_size
        self.attn_norm = nn.RMSNorm(width, config.norm_eps)
        self.attn = Attention(config, f"text.layers.{index}")
        self.mlp_norm = nn.RMSNorm(width, config.norm_eps)
        if config.is_moe_layer(index):
            self.moe = MoE(
                width,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                config.moe,
                name=f"text.layers.{index}",
            )
        else:
            self.mlp = SwiGLU(width, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents,
        tokens: Tokens,
    ) -> Tensor:
        attended = self.attn(self.attn_norm(x_BSD), cos, sin, documents, tokens.moment)
        x_BSD = x_BSD + attended
        normed_BSD = self.mlp_norm(x_BSD)
        if hasattr(self, "moe"):
            out_TD = self.moe(normed_BSD.flatten(0, 1), tokens)
            return x_BSD + out_TD.view_as(x_BSD)
        return x_BSD + self.mlp(normed_BSD)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys (Qwen3).

    first_head: the number of the first head here, of those that ranks share
    """

    def __init__(self, config: TextConfig, name: str):
        super().__init__()
        self.name, self.dropout = name, config.attention_dropout
        self.num_heads, self.first_head = config.num_heads, 0
        width, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q = nn.Linear(width, config.num_heads * config.head_dim, bias)
        self.k = nn.Linear(width, config.num_kv_heads * config.head_dim, bias)
        self.v = nn.Linear(width, config.num_kv_heads * config.head_dim, bias)
        self.o = nn.Linear(config.num_heads * config.head_dim, width, bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, documents: Documents, moment: Moment
    ) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        heads = (-1, self.head_dim)
        q, k, v = (linear(x_TD).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        dropout = None
        if self.training and self.dropout:
            dropout = Dropout(self.dropout, self.name, moment, self.first_head)
        out = attend(q, k, v, documents, causal=True, dropout=dropout)
        return self.o(out.flatten(1)).unflatten(0, x_BSD.shape[:2])
