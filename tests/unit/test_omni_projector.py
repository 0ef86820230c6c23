"""The projector against naive loops, one picture at a time, and the Q-Former against BLIP-2's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.parity.test_siglip2 import batch_of, error
from titan_vlm.errors import ConfigError
from titan_vlm.models.layers.attention import Documents
from titan_vlm.models.moe.config import MoE, MoEConfig
from titan_vlm.models.omni.config import FINAL, FLAVORS, POOLED, with_settings
from titan_vlm.models.omni.projector import Projector, QFormer, Resampler
from titan_vlm.models.projector import Projector as Settings

GRIDS = [(1, 4, 6), (2, 2, 4), (1, 6, 2)]  # the second a video of two frames
LENS = [24, 8, 8, 12]


def fill(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.double()


def config_of(reduction, levels=("1:0", "2:2", "pooled:2", "final:1"), moe=None, **settings):
    positions = "1d" if reduction in ("resampler", "qformer") else "mrope"
    wanted = Settings(reduction, 5, 3, list(levels), positions=positions, **settings)
    return with_settings(FLAVORS["debug"], MoE(projector=moe or MoEConfig()), wanted)


def batch(grids=GRIDS):
    made = batch_of([], [], 1)
    made.grids = list(grids)
    return made


def scales_of(config, lens=LENS):
    generator = torch.Generator().manual_seed(2)
    names = [*map(str, range(config.vision.depth)), FINAL]
    width, size = config.vision.hidden_size, sum(lens)
    scales = {n: torch.randn(size, width, generator=generator).double() for n in names}
    scales[POOLED] = torch.randn(len(lens), width, generator=generator).double()
    return scales


def attend(x, seen, attn):
    """Multi-head attention, a head and a query at a time."""
    q, k, v = attn.q(x), attn.k(seen), attn.v(seen)
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(0, q.shape[1], attn.head_dim):
            part = slice(h, h + attn.head_dim)
            scores = k[:, part] @ q[i, part] / attn.head_dim**0.5
            heads.append(scores.softmax(0) @ v[:, part])
        rows.append(torch.cat(heads))
    return attn.o(torch.stack(rows))


def mlp(x, layer):
    return layer.fc2(F.gelu(layer.fc1(x)))


def resample(x, module):
    q = module.queries.weight
    for layer in module.layers.values():
        normed = layer.norm_queries(q)
        q = q + attend(normed, torch.cat((layer.norm_patches(x), normed)), layer.attn)
        q = q + mlp(layer.norm(q), layer)
    return module.norm(q)


def ask(x, module):
    q = module.norm(module.queries.weight)
    for i, layer in enumerate(module.layers.values()):
        q = layer.attn_norm(q + attend(q, q, layer.attn))
        if i % 2 == 0:
            q = layer.cross_norm(q + attend(q, x, layer.cross))
        q = layer.norm(q + mlp(q, layer))
    return q


def naive(scale, x_ND, lens, reduction):
    """One frame at a time."""
    rows = []
    for x in x_ND.split(lens):
        if reduction == "resampler":
            x = resample(x, scale.reduce)
        if reduction == "qformer":
            x = ask(x, scale.reduce)
        x = scale.bridge.norm(x)
        if reduction == "merge":  # four behind one another are a square
            x = torch.stack([torch.cat(list(x[i : i + 4])) for i in range(0, len(x), 4)])
        rows.append(mlp(x, scale.bridge))
    return torch.cat(rows)


@pytest.mark.parametrize("reduction", ["none", "merge", "resampler", "qformer"])
def test_every_level_equals_a_loop_over_frames(reduction):
    config = config_of(reduction)
    projector, scales = fill(Projector(config)), scales_of(config)
    features, levels = projector(scales, batch())
    assert len(levels) == 3
    tokens = [{"none": n, "merge": n // 4}.get(reduction, 5) for n in LENS]

    def way(j, name):
        return naive(projector.levels[str(j)], scales[name], LENS, reduction)

    pooled = mlp(projector.levels["2"].bridge.norm(scales[POOLED]), projector.levels["2"].bridge)
    pooled = torch.cat([row.expand(n, -1) for row, n in zip(pooled, tokens, strict=True)])
    expected = [way(0, "1"), way(3, FINAL), way(1, "2") + pooled]
    assert error(features, naive(projector.final, scales[FINAL], LENS, reduction)) < 1e-12
    for ours, theirs in zip(levels, expected, strict=True):
        assert ours.shape == (sum(tokens), config.text.hidden_size)
        assert error(ours, theirs) < 1e-12
    wanted = torch.autograd.grad(
        sum(x.pow(2).sum() for x in expected), list(projector.parameters()), allow_unused=True
    )
    sum(x.pow(2).sum() for x in levels).backward()
    for (name, parameter), gradient in zip(projector.named_parameters(), wanted, strict=True):
        if gradient is None:
            assert name.startswith("final."), name
        else:
            # In thousands, but for the biases of keys: zero, for a softmax does not see them.
            assert error(parameter.grad, gradient, 1.0) < 1e-10, name


def test_a_layer_without_a_level_between_others_gets_nothing_added():
    config = config_of("merge", levels=("3:2",))
    _, levels = fill(Projector(config))(scales_of(config), batch())
    assert [bool(x.any()) for x in levels] == [False, False, True]


def test_depth_says_how_many_levels_are_in_use():
    config = config_of("merge", depth=1)
    projector, scales = fill(Projector(config)), scales_of(config)
    features, levels = projector(scales, batch())
    assert [bool(x.any()) for x in levels] == [True, False, False]
    projector.depth = 4  # another stage of the run
    again, more = projector(scales, batch())
    assert torch.equal(again, features) and torch.equal(more[0], levels[0]) and len(more) == 3
    projector.depth = 0
    assert not any(x.any() for x in projector(scales, batch())[1])


@pytest.mark.parametrize("reduction", ["none", "merge", "resampler", "qformer"])
def test_without_pictures_every_parameter_still_takes_part(reduction):
    config = config_of(reduction)
    projector = fill(Projector(config))
    features, levels = projector(scales_of(config, []), batch([]))
    assert features.shape == (0, config.text.hidden_size)
    (features.sum() + sum(x.sum() for x in levels)).backward()
    assert [name for name, p in projector.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("reduction", ["merge", "resampler"])
def test_experts_see_the_tokens_of_each_picture(reduction):
    moe = MoEConfig(experts=4, top_k=2, expert_width=24)
    config = config_of(reduction, moe=moe)
    projector, scales = fill(Projector(config)), scales_of(config)
    features, levels = projector(scales, batch())
    alone, frames = [], 0
    for grid, lens in zip(GRIDS, ([24], [8, 8], [12]), strict=True):
        rows = slice(sum(LENS[:frames]), sum(LENS[: frames + len(lens)]))
        part = {name: x[rows] for name, x in scales.items() if name != POOLED}
        part[POOLED] = scales[POOLED][frames : frames + len(lens)]
        frames += len(lens)
        alone.append(projector(part, batch([grid])))
    assert error(features, torch.cat([x for x, _ in alone])) < 1e-12
    for j, level in enumerate(levels):
        assert error(level, torch.cat([x[j] for _, x in alone])) < 1e-12


def test_the_qformer_equals_blip_2s():
    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf = Blip2QFormerConfig(
        **size, intermediate_size=192, encoder_hidden_size=48, cross_attention_frequency=2
    )
    theirs, ours = fill(Blip2QFormerModel(hf)).eval(), fill(QFormer(48, 12, 5, 3))
    copies = {"norm": theirs.layernorm}
    for i, layer in enumerate(theirs.encoder.layer):
        copies |= {
            f"layers.{i}.attn.q": layer.attention.attention.query,
            f"layers.{i}.attn.k": layer.attention.attention.key,
            f"layers.{i}.attn.v": layer.attention.attention.value,
            f"layers.{i}.attn.o": layer.attention.output.dense,
            f"layers.{i}.attn_norm": layer.attention.output.LayerNorm,
            f"layers.{i}.fc1": layer.intermediate_query.dense,
            f"layers.{i}.fc2": layer.output_query.dense,
            f"layers.{i}.norm": layer.output_query.LayerNorm,
        }
        if i % 2 == 0:
            copies |= {
                f"layers.{i}.cross.q": layer.crossattention.attention.query,
                f"layers.{i}.cross.k": layer.crossattention.attention.key,
                f"layers.{i}.cross.v": layer.crossattention.attention.value,
                f"layers.{i}.cross.o": layer.crossattention.output.dense,
                f"layers.{i}.cross_norm": layer.crossattention.output.LayerNorm,
            }
    for name, module in copies.items():
        ours.get_submodule(name).load_state_dict(module.state_dict())
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    queries = ours.queries.weight.expand(2, -1, -1)
    expected = theirs(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
    found = ours(x.flatten(0, 1), Documents([7, 7])).unflatten(0, (2, 5))
    assert error(found, expected) < 1e-12


def test_what_cannot_be_joined_is_refused_by_its_key():
    for settings, said in [
        ({"levels": ["9:0"]}, 'projector.levels: no scale "9"; .* blocks 0 to 3, final and pooled'),
        ({"levels": ["1:4"]}, 'projector.levels: "1:4": expected .* layers 0 to 3'),
        ({"levels": ["1"]}, 'projector.levels: "1": expected scale:layer'),
        ({"depth": 1}, "projector.depth = 1: there are 0 levels"),
        ({"reduction": "resampler"}, 'projector.positions: expected "1d" with .*"resampler"'),
    ]:
        with pytest.raises(ConfigError, match=said):
            with_settings(FLAVORS["debug"], MoE(), Settings(**settings))


def test_resampler_and_qformer_give_as_many_tokens_whatever_the_frame():
    for kind in (Resampler, QFormer):
        module = fill(kind(48, 12, 6, 2))
        x = torch.randn(30, 48, dtype=torch.float64)
        whole = module(x, Documents([4, 20, 6]))
        parts = [module(part, Documents([len(part)])) for part in x.split([4, 20, 6])]
        assert whole.shape == (18, 48) and error(whole, torch.cat(parts)) < 1e-12
