"""A run whose experts are made of a dense checkpoint: its first loss is the dense model's."""

import pytest
import torch

from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.errors import ConfigError
from titan_vlm.models.layers.head import whole


class Loss(Silent):
    def end_step(self, step, loss, **_):
        self.loss = loss


def first_loss(output, **changes):
    run, seen = train.prepare(small_config(output, training__dtype="float64", **changes)), Loss()
    weights = {name: whole(p.detach()).clone() for name, p in run.model.named_parameters()}
    train.train_step(run, seen)
    run.loader.close()
    torch.distributed.destroy_process_group()
    return seen.loss, weights


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model with weights of its own, and its loss on the first step of the run."""
    folder = tmp_path_factory.mktemp("dense")
    changes = {"model__flavor": "debug", "checkpoint__export_dtype": "float64"}
    config = small_config(folder, training__dtype="float64", **changes)
    run = train.prepare(config)
    with torch.no_grad():  # as large as trained ones: the MLPs matter
        for name, parameter in run.model.named_parameters():
            if ".mlp." in name:
                parameter *= 4
    train.export_hf(run)
    run.loader.close()
    torch.distributed.destroy_process_group()
    loaded = changes | {"checkpoint__initial_load_path": str(folder / "hf")}
    return folder / "hf", first_loss(folder / "first", **loaded)[0]


def upcycled(directory, experts, top_k, width, shards, **more):
    changes = {
        "model__flavor": "hf",
        "model__hf_path": str(directory),
        "checkpoint__initial_load_path": str(directory),
        "moe__text__experts": str(experts),
        "moe__text__top_k": str(top_k),
        "moe__text__expert_width": str(width),
        "moe__text__upcycle_shards": str(shards),
    }
    return changes | {f"moe__text__{key}": value for key, value in more.items()}


@pytest.mark.parametrize(
    ("experts", "top_k", "width", "shards", "more"),
    [
        (4, 2, 384, 1, {}),
        (8, 4, 192, 2, {}),
        (8, 4, 96, 4, {"score": "softmax_topk"}),
        (4, 2, 384, 1, {"layers": "1,3"}),
    ],
)
def test_the_first_loss_is_the_dense_models(tmp_path, dense, experts, top_k, width, shards, more):
    directory, wanted = dense
    changes = upcycled(directory, experts, top_k, width, shards, **more)
    loss, weights = first_loss(tmp_path, checkpoint__export_hf="false", **changes)
    assert loss == pytest.approx(wanted, rel=1e-10)
    assert any(name.endswith("moe.experts.down") for name in weights)


def test_noise_makes_experts_differ_by_its_size(tmp_path, dense):
    directory, wanted = dense
    changes = upcycled(directory, 4, 2, 384, 1, upcycle_noise="0.1")
    loss, weights = first_loss(tmp_path, **changes)
    assert loss != pytest.approx(wanted, rel=1e-6)
    assert loss == pytest.approx(wanted, rel=0.05)
    down_EFD = weights["text.layers.0.moe.experts.down"]
    away = (down_EFD[0] - down_EFD[1]).square().mean() / down_EFD[0].square().mean()
    assert away.sqrt() == pytest.approx(0.1 * 2**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(experts=4, top_k=2, width=100, shards=2), "expert_width: 100 in 2 shards"),
        (dict(experts=4, top_k=2, width=192, shards=3), "upcycle_shards = 3: expected a divisor"),
        (dict(experts=4, top_k=2, width=384, shards=1, score="sigmoid"), "moe.text.score: leave"),
        (
            dict(experts=4, top_k=2, width=384, shards=1, shared_width="8"),
            "shared expert (moe.text.shared_width = 8)",
        ),
    ],
)
def test_what_cannot_be_made_of_the_dense_model_is_refused(tmp_path, dense, changes, words):
    with pytest.raises(ConfigError) as error:
        train.prepare(small_config(tmp_path, **upcycled(dense[0], **changes)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert words in str(error.value)


def test_a_checkpoint_that_has_experts_is_not_upcycled(tmp_path, dense):
    """Of the same dimensions: it is the directory's tensors that tell."""
    changes = upcycled(dense[0], 4, 2, 384, 1) | {"checkpoint__export_dtype": "float32"}
    run = train.prepare(small_config(tmp_path / "made", **changes))
    train.export_hf(run)
    run.loader.close()
    torch.distributed.destroy_process_group()
    changes["checkpoint__initial_load_path"] = str(tmp_path / "made" / "hf")
    with pytest.raises(
        ConfigError, match=r"hf has experts \(.*mlp.experts.*upcycle_shards = 1"
    ) as e:
        train.prepare(small_config(tmp_path / "again", **changes))
    torch.distributed.destroy_process_group()
    assert "\n" not in str(e.value)


def test_a_dense_checkpoint_is_not_taken_for_experts(tmp_path, dense):
    changes = upcycled(dense[0], 4, 2, 384, shards=0)
    with pytest.raises(ConfigError, match=r"hf is dense .*set moe.text.upcycle_shards") as error:
        train.prepare(small_config(tmp_path, **changes))
    torch.distributed.destroy_process_group()
    assert "missing" not in str(error.value)


def test_a_dense_checkpoint_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.initial_load_path, got none"):
        small_config(
            tmp_path,
            moe__text__upcycle_shards="1",
            moe__text__experts="4",
            moe__text__top_k="2",
            moe__text__expert_width="8",
        )
