"""The dispatchers of fused libraries against all-to-all, over stand-ins for the libraries.

The stand-ins (`tests/fake_ep.py`) have the libraries' signatures and assert what those demand.
"""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests import fake_ep
from titan_vlm import distributed
from titan_vlm.errors import ConfigError
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe import fused_library
from titan_vlm.models.moe.exchange import AllToAllDispatcher
from titan_vlm.models.moe.experts import Experts
from titan_vlm.models.moe.fused_exchange import DeepEPDispatcher, make_dispatcher, to_table
from titan_vlm.models.moe.fused_library import FusedOptions
from titan_vlm.models.moe.hybrid_exchange import HybridEPDispatcher
from titan_vlm.models.moe.layout import ALIGN, ALIGN_WIDE
from titan_vlm.models.moe.routing import Routing

WIDTH, HIDDEN, EXPERTS = 16, 24, 8
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def chosen(tokens: int, pairs: int = 2, kept: float = 1.0) -> torch.Tensor:
    """[T, K] experts of each token, -1 for none: dropped at random, in any column."""
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(pairs).indices
    dropped_TK = torch.rand(tokens, pairs, generator=generator) > kept
    return experts_TK.masked_fill(dropped_TK, -1)


# What the ranks 0 and 1 hold.
ROUTINGS = {
    "ordinary": (chosen(16), chosen(16)),
    "a prime number of tokens": (chosen(13), chosen(7)),
    "more tokens than one block": (chosen(3), chosen(131)),
    "no token at all": (chosen(0), chosen(0)),
    "one rank without tokens": (chosen(0), chosen(5)),
    "one token": (chosen(1), chosen(0)),
    "all to one expert": (torch.full((9, 1), 3), torch.full((4, 1), 3)),
    "none to the experts of a rank": (chosen(9, 1).fill_(6), chosen(4, 1).fill_(7)),
    "pairs dropped": (chosen(17, 3, kept=0.5), chosen(11, 3, kept=0.5)),
    "no pair left": (chosen(5, 2, kept=-1.0), chosen(3, 2, kept=-1.0)),
    "any number of experts": (chosen(12, EXPERTS, kept=0.4), chosen(9, EXPERTS, kept=0.6)),
}
WAYS = {
    "deepep": ("deepep", FusedOptions()),
    "deepep async": ("deepep", FusedOptions(async_dispatch=True)),
    "uccl_ep async": ("uccl_ep", FusedOptions(async_dispatch=True)),
    "hybridep": ("hybridep", FusedOptions()),
    "hybridep fused": ("hybridep", FusedOptions(permute_fusion=True, pad_multiple=2 * ALIGN)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_outputs_and_gradients_are_those_of_all_to_all(world, way, name):
    for ours, expected in world.run(2, both_layers, way, ROUTINGS[name]):
        assert ours.keys() == expected.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], **CLOSE, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_with_different_numbers_of_tokens(world, way):
    routings = (chosen(5), chosen(70, 2, kept=0.7), chosen(0), chosen(12))
    for ours, expected in world.run(4, both_layers, way, routings):
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], **CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_layer_has_the_same_gradients(world, way):
    for ours, expected in world.run(2, both_layers, way, ROUTINGS["ordinary"], True):
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], **CLOSE)


@pytest.mark.parametrize("way", ["deepep", "hybridep"])
def test_bfloat16_tokens_travel_with_float32_weights(world, way):
    """The stand-ins refuse weights of another type; the router's gradient keeps its precision."""
    for ours, expected in world.run(2, both_layers, way, ROUTINGS["ordinary"], False, "bfloat16"):
        assert ours["weights"].dtype == torch.float32
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], rtol=3e-2, atol=3e-2)


def both_layers(way, routings, recompute=False, dtype="float64"):
    """Outputs and gradients with the dispatcher in question, and with all-to-all."""
    group = start()
    experts_TK = routings[group.rank()]
    fused = stand_in(way, group, experts_TK.shape[1])
    reference = AllToAllDispatcher(group)
    dtype = getattr(torch, dtype)
    return [run_layer(d, group, experts_TK, recompute, dtype) for d in (fused, reference)]


def start():
    import torch.distributed as dist

    distributed.start("cpu")
    return dist.group.WORLD


def stand_in(way, group, max_pairs, width=WIDTH):
    name, options = WAYS[way] if isinstance(way, str) else way
    if name == "hybridep":
        return HybridEPDispatcher(group, width, options, fake_ep.FakeHybridEPBuffer)
    return DeepEPDispatcher(name, group, width, max_pairs, options, fake_ep.FakeBuffer)


def run_layer(dispatcher, group, experts_TK, recompute, dtype, width=WIDTH):
    whole = Experts(EXPERTS, width, HIDDEN).double()
    init_weights(whole, 0, std=0.3)
    experts = Experts(EXPERTS // group.size(), width, HIDDEN).to(dtype)
    for name, parameter in whole.named_parameters():
        getattr(experts, name).data.copy_(parameter.detach().chunk(group.size())[group.rank()])

    generator = torch.Generator().manual_seed(group.rank())
    tokens_P, column_P = (experts_TK >= 0).nonzero(as_tuple=True)
    x_TD = torch.randn(len(experts_TK), width, dtype=torch.float64, generator=generator).to(dtype)
    weights_P = torch.rand(len(tokens_P), dtype=torch.float64, generator=generator)
    weights_P = weights_P.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    x_TD.requires_grad_()

    def layer(x_TD, weights_P):
        routing = Routing(tokens_P, experts_TK[tokens_P, column_P], weights_P, EXPERTS)
        rows_RD, state = dispatcher.dispatch(x_TD, routing)
        ends = state.layout.ends_E.tolist()
        assert ends == sorted(ends) and not any(end % ALIGN_WIDE for end in ends)
        return dispatcher.combine(experts(rows_RD, state.layout), state)

    run = (lambda *args: checkpoint(layer, *args, use_reentrant=False)) if recompute else layer
    y_TD = run(x_TD, weights_P)
    # No gradient that is zero, or the same for all rows.
    (y_TD * torch.sin(torch.arange(y_TD.numel())).view_as(y_TD)).sum().backward()
    return {
        "y": y_TD.detach(),
        "x": x_TD.grad,
        "weights": weights_P.grad,
        "gate_up": experts.gate_up.grad,
        "down": experts.down.grad,
    }


@pytest.mark.parametrize("name", ["deepep", "uccl_ep", "hybridep"])
@pytest.mark.parametrize("share", [True, False])
def test_layers_share_one_buffer_or_have_their_own(world, name, share):
    """Two layers of one width and a wider one; HybridEP has a buffer per width."""
    for buffers, calls, differences in world.run(2, three_layers, name, share):
        expected = {"hybridep": 2}.get(name, 1) if share else 3
        assert buffers == expected
        assert calls == 3 * ["dispatch", "combine", "dispatch again", "combine"]
        assert max(differences) < 1e-12


def three_layers(name, share):
    group = start()
    experts_TK = ROUTINGS["ordinary"][group.rank()]
    fake = fake_ep.FakeHybridEPBuffer if name == "hybridep" else fake_ep.FakeBuffer
    fake.made.clear()
    way = (name, FusedOptions(share_buffer=share, num_sms=18))
    widths = (16, 16, 32)
    layers = [stand_in(way, group, 2, width) for width in widths]
    differences = []
    for width, dispatcher in zip(widths, layers, strict=True):
        arguments = (group, experts_TK, False, torch.float64, width)
        ours = run_layer(dispatcher, *arguments)
        expected = run_layer(AllToAllDispatcher(group), *arguments)
        differences += [float((ours[key] - expected[key]).abs().max()) for key in ours]
    if name == "hybridep":
        assert {sms for sms, _ in fake.made} == {(18, 18)}
    else:
        assert layers[0].connection.dispatch_config.num_sms == 18
    return len(fake.made), [call for _, calls in fake.made for call in calls], differences


def test_what_nobody_uses_any_more_is_given_back(world):
    assert world.run(2, shared_connections) == [(1, 0)] * 2


def shared_connections():
    group = start()
    kept = [stand_in("deepep", group, 2) for _ in range(3)]
    shared = len(fused_library._SHARED)
    kept.clear()
    return shared, len(fused_library._SHARED)


def test_a_number_of_ranks_that_the_library_has_no_setting_for(world):
    for message in world.run(3, refused_ranks):
        assert "3 ranks" in message and 'dispatcher = "all_to_all"' in message


def refused_ranks():
    with pytest.raises(ConfigError) as error:
        stand_in("deepep", start(), 2)
    return str(error.value)


def test_the_table_of_pairs():
    routing = Routing(
        token_ids_P=torch.tensor([0, 0, 2]),
        expert_ids_P=torch.tensor([5, 1, 4]),
        weights_P=torch.tensor([0.5, 0.25, 1.0]),
        num_experts=8,
    )
    experts_TK, weights_TK = to_table(routing, num_tokens=3, max_pairs=3)
    assert experts_TK.tolist() == [[5, 1, -1], [-1, -1, -1], [4, -1, -1]]
    assert weights_TK.tolist() == [[0.5, 0.25, 0], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(IndexError):
        to_table(routing, num_tokens=3, max_pairs=1)


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "package"), [("deepep", "deep_ep"), ("uccl_ep", "uccl"), ("hybridep", "deep_ep")]
)
def test_a_missing_library_is_named_with_its_hardware_and_the_way_out(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        make_dispatcher(name, FakeGroup(), 2048, max_pairs=8)
    message = str(error.value)
    assert f'dispatcher = "{name}" needs the package {package} (' in message
    assert "GPUs" in message and 'dispatcher = "all_to_all" works everywhere' in message


class FakeGroup:
    def size(self):
        return 2


def test_a_library_of_another_kind_is_not_taken_for_it(monkeypatch):
    """The package deep_ep without HybridEP: DeepEP's main branch."""
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    with pytest.raises(ConfigError, match="HybridEPBuffer"):
        make_dispatcher("hybridep", FakeGroup(), 2048, max_pairs=8)


def test_a_library_without_a_gpu_is_refused(monkeypatch):
    module = ModuleType("deep_ep")
    module.Buffer = fake_ep.FakeBuffer
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU is visible"):
        make_dispatcher("deepep", FakeGroup(), 2048, max_pairs=8)


def test_the_library_is_used_where_there_is_one(monkeypatch):
    """And its tensors are checked: the CPU's are refused at the first dispatch."""
    module = ModuleType("deep_ep")
    module.Buffer, module.HybridEPBuffer = fake_ep.FakeBuffer, fake_ep.FakeHybridEPBuffer
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("deepep", "hybridep"):
        dispatcher = make_dispatcher(name, FakeGroup(), 2048, max_pairs=8)
        assert dispatcher.connection.buffer_class.__module__ == fake_ep.__name__
        with pytest.raises(ConfigError, match="bfloat16 on CUDA, not bfloat16 on cpu"):
            dispatcher.dispatch(torch.zeros(1, 2048, dtype=torch.bfloat16), None)
        with pytest.raises(ConfigError, match="hidden sizes"):
            make_dispatcher(name, FakeGroup(), 2050, max_pairs=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype):
    x_TD = torch.zeros(1, 2048, dtype=dtype, device="meta")
    with pytest.raises(ConfigError, match=str(dtype).removeprefix("torch.")):
        fused_library.check_tensor("deepep", x_TD)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("deepep", 2048, 8, 8), None),
        (("deepep", 2056, 8, 8), "multiples of 16 below 8192, not 2056"),
        (("deepep", 2064, 8, 8), None),
        (("deepep", 2064, 16, 8), "multiples of 256 below 8192, not 2064"),
        (("uccl_ep", 8192, 16, 8), "not 8192"),
        (("hybridep", 8192, 16, 8), None),
        (("hybridep", 2056, 16, 8), "multiples of 16, not 2056"),
        (("deepep", 2048, 8, 33), "at most 32 experts per token, the router may choose 33"),
        (("hybridep", 2048, 8, 128), None),
    ],
)
def test_sizes_that_the_kernels_cannot_take_are_refused(arguments, expected):
    if expected is None:
        fused_library.check_model(*arguments)
        return
    with pytest.raises(ConfigError, match=expected):
        fused_library.check_model(*arguments)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("deepep", {"pad_multiple": 64}, "pad_multiple = 64.*one of hybridep"),
        ("uccl_ep", {"permute_fusion": True}, "permute_fusion = True.*one of hybridep"),
        ("hybridep", {"async_dispatch": True}, "one of deepep and uccl_ep"),
        ("deepep", {"num_sms": 7}, "num_sms = 7: expected a positive even number"),
        ("hybridep", {"num_sms": -1}, "num_sms = -1: expected a positive number"),
        ("hybridep", {"pad_multiple": 48}, "pad_multiple = 48.*multiple of 32"),
    ],
)
def test_an_option_that_would_do_nothing_or_harm_is_refused(name, options, expected):
    with pytest.raises(ConfigError, match=expected):
        make_dispatcher(name, FakeGroup(), 2048, 8, FusedOptions(**options))


def test_the_libraries_have_their_own_default_of_multiprocessors():
    expected = {"deepep": 20, "uccl_ep": 20, "hybridep": 24}
    found = {name: fused_library.choose_num_sms(name, FusedOptions()) for name in expected}
    assert found == expected


def test_fusion_is_not_asked_of_a_release_without_it():
    with pytest.raises(ConfigError, match="permute_fusion"):
        HybridEPDispatcher(
            FakeGroup(),
            2048,
            FusedOptions(permute_fusion=True),
            fake_ep.FakeHybridEPBufferWithoutFusion,
        )


@pytest.mark.parametrize("name", ["deepep", "uccl_ep", "hybridep"])
def test_the_stand_ins_have_the_signatures_of_the_library(name):
    """Where it is installed: every argument of a stand-in is the library's, in its order."""
    library = fused_library.LIBRARIES[name]
    real_class = getattr(pytest.importorskip(library.module), library.buffer)
    fake_class = fake_ep.FakeHybridEPBuffer if name == "hybridep" else fake_ep.FakeBuffer
    methods = [key for key, value in vars(fake_class).items() if callable(value)]
    for method in [key for key in methods if key == "__init__" or not key.startswith("_")]:
        real, fake = (
            inspect.signature(getattr(cls, method)).parameters for cls in (real_class, fake_class)
        )
        assert [key for key in real if key in fake] == list(fake), method
