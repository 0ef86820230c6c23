"""OmniMoE for transformers: a SigLIP2 tower and a DeepStack projector (vision_titan_omni.py), a
Qwen3 decoder (here), and experts in any of the three (moe_titan_omni.py).

    pixel_values [N, C] -> vision -> projector -> features [M, D]   in place of the visual tokens
                                             +--> levels [M, D]     added behind decoder layers
    input_ids [B, S] -> embed ------------------> decoder -> logits [B, S, V]

Written for inference, next to the weights it computes with. `image_grid_thw` (time, height, width
in patches) and `pixel_values` are of all pictures in the order in which they appear in `input_ids`;
a picture attends to itself alone, a video frame by frame.

Shapes: B rows, S tokens, L tokens with those cached, N patches, M visual tokens, I pictures,
D model width, H heads, C head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .moe_titan_omni import Experts, MoE, Router, SwiGLU
from .vision_titan_omni import Projector, VisionTower


class TitanOmniConfig(PretrainedConfig):
    """`vision_config`, `projector_config`: dictionaries as they stand in config.json."""

    model_type = "titan_omni"
    sub_configs = {"text_config": Qwen3Config}

    def __init__(self, text_config=None, vision_config=None, projector_config=None, **kwargs):
        given = isinstance(text_config, Qwen3Config)
        self.text_config = text_config if given else Qwen3Config(**(text_config or {}))
        self.vision_config, self.projector_config = vision_config or {}, projector_config or {}
        super().__init__(**kwargs)

    @property
    def frame_queries(self) -> int:
        """Visual tokens of a frame where their number is fixed, else 0."""
        fixed = self.projector_config["reduction"] in ("resampler", "qformer")
        return self.projector_config["tokens"] if fixed else 0

    def frame_tokens(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in visual tokens of a frame of as many patches."""
        merge = self.vision_config["merge_size"]
        return (1, self.frame_queries) if self.frame_queries else (height // merge, width // merge)


class TitanOmniForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = TitanOmniConfig
    _tied_weights_keys = {"lm_head.weight": "text.embed.weight"}
    _keep_in_fp32_modules_strict = ["steering"]  # numbers that differ by thousandths
    _supports_sdpa = True

    def __init__(self, config: TitanOmniConfig):
        super().__init__(config)
        text = config.text_config
        self.vision = VisionTower(config.vision_config)
        self.projector = Projector(config)
        self.text = TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (Router, Experts)):
            for name, parameter in module.named_parameters(recurse=False):
                std = 0.0 if name.endswith("bias") else self.config.text_config.initializer_range
                nn.init.normal_(parameter, std=std)

    def get_input_embeddings(self):
        return self.text.embed

    def set_input_embeddings(self, value):
        self.text.embed = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V].

        Args:
            position_ids: [B, S] or [3, B, S] (time, height, width); found from `input_ids` where
                nothing is cached.
            logits_to_keep: of the last so many tokens; 0: of all.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(attention_mask, dict):  # of a static cache, whose keys are not all there yet
            raise ValueError("cache_implementation: only the dynamic cache is supported")
        where_M = self._is_visual(input_ids).flatten().nonzero().squeeze(-1)
        has_pictures = pixel_values is not None and len(pixel_values) > 0
        if len(where_M) and not (has_pictures or past):  # a placeholder that is generated is a word
            raise ValueError(f"{len(where_M)} visual tokens in input_ids and no pixel_values")
        if position_ids is None:
            if past:
                raise ValueError("behind cached tokens position_ids are needed")
            position_ids = positions(self.config, input_ids, attention_mask, image_grid_thw)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x_BSD, levels = self.text.embed(input_ids), []
        if has_pictures and (len(where_M) or not past):  # else they are among the cached tokens
            grids = image_grid_thw.tolist()
            features_MD, levels = self.projector(self.vision(pixel_values, grids), grids)
            if len(features_MD) != len(where_M):
                raise ValueError(
                    f"{len(where_M)} visual tokens in input_ids, {len(features_MD)} of the pictures"
                )
            x_BSD = x_BSD.flatten(0, 1).index_copy(0, where_M, features_MD).view_as(x_BSD)
        position_ids = position_ids.expand(3, *input_ids.shape)
        x_BSD = self.text(x_BSD, position_ids, attention_mask, past_key_values, levels, where_M)
        logits = self.lm_head(x_BSD[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _is_visual(self, input_ids: Tensor) -> Tensor:
        return is_visual(self.config, input_ids)

    # ------------------------------------------------------------------------ for `generate`

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """[3, B, S]; `generate` counts on from the last token's."""
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if self._is_visual(ids[:, -1]).any():
            raise ValueError("a prompt that ends within a picture; let a word follow it")
        grids = model_kwargs.get("image_grid_thw")
        return positions(self.config, ids, model_kwargs.get("attention_mask"), grids)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Every row `expand_size` times, and with it its pictures."""
        pixels, grids = kwargs.pop("pixel_values", None), kwargs.pop("image_grid_thw", None)
        rows, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if pixels is None or expand_size == 1:
            return rows, kwargs | {"pixel_values": pixels, "image_grid_thw": grids}
        frames = [(t, *self.config.frame_tokens(h, w)) for t, h, w in grids.tolist()]
        tokens = torch.tensor([t * h * w for t, h, w in frames]).cumsum(0)
        ends_B = self._is_visual(input_ids).sum(1).cumsum(0).cpu()
        counts = torch.searchsorted(tokens, ends_B, right=True).diff(prepend=tokens.new_zeros(1))
        grids_B = grids.split(counts.tolist())
        pixels_B = pixels.split([int(part.prod(-1).sum()) for part in grids_B])
        again = [
            torch.cat([part for part in parts for _ in range(expand_size)])
            for parts in (pixels_B, grids_B)
        ]
        return rows, kwargs | dict(zip(("pixel_values", "image_grid_thw"), again, strict=True))


def is_visual(config: TitanOmniConfig, ids: Tensor) -> Tensor:
    """Which tokens stand for pictures or frames of a video."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def positions(
    config: TitanOmniConfig, ids_BS: Tensor, mask_BS: Tensor | None, grids_I3: Tensor | None
) -> Tensor:
    """[3, B, S]: text counts up in all three; a frame spans its grid from where the text stands,
    and text goes on after its longer side. With positions "1d" all is counted as text."""
    valid_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    one_by_one = config.projector_config["positions"] == "1d"
    if grids_I3 is None and not one_by_one and is_visual(config, ids_BS).any():
        raise ValueError("visual tokens in input_ids and no image_grid_thw")
    if grids_I3 is None or one_by_one:
        return (valid_BS.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    frames = iter([config.frame_tokens(h, w) for t, h, w in grids_I3.tolist() for _ in range(t)])
    found_3BS = torch.zeros((3, *ids_BS.shape), dtype=torch.long)
    for b, (ids, valid) in enumerate(zip(ids_BS.cpu(), valid_BS.bool().cpu(), strict=True)):
        now, index, parts = 0, 0, []
        visual = is_visual(config, ids[valid]).tolist()
        while index < len(visual):
            if visual[index]:
                height, width = next(frames, (0, 0))
                if not all(visual[index : index + height * width]) or not height:
                    raise ValueError("the visual tokens in input_ids are not those of the pictures")
                y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
                parts.append(now + torch.stack((torch.zeros_like(y), y, x)).flatten(1))
                now, index = now + max(height, width), index + height * width
            else:
                parts.append(torch.full((3, 1), now))
                now, index = now + 1, index + 1
        found_3BS[:, b, valid] = torch.cat(parts, 1)
    return found_3BS.to(ids_BS.device)


# --------------------------------------------------------------------------------------- decoder


class TextModel(nn.Module):
    """Embedding, layers and the last norm of Qwen3, with DeepStack."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        positions_3BS: Tensor,
        mask_BL: Tensor | None,
        cache: Cache | None,
        levels: list[Tensor],
        where_M: Tensor,
    ) -> Tensor:
        """Normalised hidden states [B, S, D].

        Args:
            mask_BL: 0 on padding, of the cached tokens, too.
            levels: [M, D], added to the visual tokens behind each of the first layers.
            where_M: which of the B * S tokens are visual.
        """
        past = cache.get_seq_length() if cache is not None else 0
        sees_BSL = visible(x_BSD.shape[1], past, mask_BL, x_BSD.device)
        cos, sin = rotary_tables(self.config, positions_3BS, x_BSD.dtype)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, cos, sin, sees_BSL, cache)
            if i < len(levels):
                x_TD = x_BSD.flatten(0, 1).index_add(0, where_M, levels[i])
                x_BSD = x_TD.view_as(x_BSD)
        return self.norm(x_BSD)


def visible(size: int, past: int, mask_BL: Tensor | None, device: torch.device) -> Tensor | None:
    """[B or 1, S, L] bool: which tokens each sees: its past without padding, and itself. None where
    that is all there is up to itself, which attention knows without a mask."""
    no_padding = mask_BL is None or bool(mask_BL.all())
    if no_padding and (past == 0 or size == 1):
        return None
    index_L = torch.arange(past + size, device=device)
    sees_SL = index_L <= index_L[past:, None]
    if no_padding:
        return sees_SL[None]
    itself_SL = index_L == index_L[past:, None]  # so that padding sees something
    return (sees_SL & mask_BL.bool()[:, None]) | itself_SL


def rotary_tables(
    config: Qwen3Config, positions_3BS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, S, C / 2] of interleaved M-RoPE: frequencies listen to time, height,
    width, time, height, width, ... as often as `mrope_section` says, the last ones to time."""
    exact, device = torch.promote_types(dtype, torch.float32), positions_3BS.device
    exponents = torch.arange(0, config.head_dim, 2, dtype=exact, device=device) / config.head_dim
    angles_3BSC = positions_3BS[..., None] * config.rope_parameters["rope_theta"] ** -exponents
    angles = angles_3BSC[0].clone()
    for axis in (1, 2):
        turns = slice(axis, 3 * config.mrope_section[axis], 3)
        angles[..., turns] = angles_3BSC[axis, ..., turns]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


class Block(nn.Module):
    def __init__(self, config: Qwen3Config, index: int):
        super().__init__()
        width = config.hidden_size
        self.attn_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.attn = TextAttention(config, index)
        self.mlp_norm = nn.RMSNorm(width, config.rms_norm_eps)
        if index in config.moe_layers:
            self.moe = MoE(width, width, config.moe)
        else:
            self.mlp = SwiGLU(width, config.intermediate_size, width)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, sees: Tensor | None, cache
    ) -> Tensor:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), cos, sin, sees, cache)
        normed_BSD = self.mlp_norm(x_BSD)
        if hasattr(self, "moe"):
            return x_BSD + self.moe(normed_BSD.flatten(0, 1)).view_as(x_BSD)
        return x_BSD + self.mlp(normed_BSD)


class TextAttention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Qwen3Config, index: int):
        super().__init__()
        width, self.index, self.head_dim = config.hidden_size, index, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q = nn.Linear(width, queries, bias=False)
        self.k = nn.Linear(width, keys, bias=False)
        self.v = nn.Linear(width, keys, bias=False)
        self.o = nn.Linear(queries, width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, sees: Tensor | None, cache
    ) -> Tensor:
        q, k, v = (
            linear(x_BSD).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v)
        )
        q, k = (rotate(x.transpose(1, 2), cos, sin) for x in (self.q_norm(q), self.k_norm(k)))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        causal = sees is None and q.shape[2] > 1
        mask = None if sees is None else sees[:, None]
        out_BHSC = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return self.o(out_BHSC.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + C / 2) of every head."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
