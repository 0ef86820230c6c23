"""What is said of a rank that did not arrive, and where NCCL is told to dump."""

import os

from titan_vlm.flight_recorder import nccl_environment
from titan_vlm.hang import Watch, explain


def answer(waited_s, what="gloo:all_reduce of default_pg"):
    return {"step": 7, "at": "titan_vlm/x.py:3 (f)", "in": what, "waited_s": waited_s}


def test_the_late_rank_is_named_with_its_place():
    assert explain([answer(20), answer(0), answer(19)], 20) == (
        "rank 1 did not arrive within comm.timeout_s = 20 s; rank 1 is at step 7 in "
        "titan_vlm/x.py:3 (f); ranks 0, 2 waited in gloo:all_reduce of default_pg"
    )


def test_a_rank_that_arrived_after_the_others_gave_up_is_late():
    assert explain([answer(20), answer(0.5)], 20).startswith("rank 1 did not arrive")


def test_a_rank_without_an_answer_did_not_arrive():
    said = explain([None, answer(20), answer(0)], 20)
    assert said.startswith("ranks 0, 2 did not arrive")
    assert "rank 0 gives no answer" in said


def test_ranks_in_different_collectives_are_told_apart():
    said = explain([answer(20), answer(20, "gloo:all_gather of mesh_ep"), answer(20)], 20)
    assert said == (
        "the ranks wait for each other for longer than comm.timeout_s = 20 s; "
        "ranks 0, 2 waited in gloo:all_reduce of default_pg; rank 1 waited in gloo:all_gather of "
        "mesh_ep"
    )


def test_many_ranks_are_counted():
    said = explain([answer(0)] + [answer(20)] * 127, 20)
    assert "; ranks 1, 2, 3, 4, 5, 6, 7, 8 and 119 more waited in gloo:all_reduce" in said


def test_nccl_dumps_into_the_run_unless_the_user_said_where(tmp_path, monkeypatch):
    name, older = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2"})
    assert nccl_environment(tmp_path)[name] == f"{tmp_path}/nccl_rank_"
    os.environ[older] = "/elsewhere/rank"
    assert nccl_environment(tmp_path)[name] == "/elsewhere/rank"
    os.environ[name] = "/mine"
    with Watch(20, tmp_path):
        assert os.environ[name] == "/mine"
        assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_one_process_has_no_watch(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Watch(20, tmp_path) as watch:
        assert not watch._thread.is_alive()
