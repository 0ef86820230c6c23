"""Every way a checkpoint can be damaged on its disk, and what the next start does about it."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import fsspec
import pytest
from torch.distributed.checkpoint import FileSystemWriter

from tests import small_run
from tests.toy_run import Run, assert_same_bits
from titan_vlm import distributed, launched
from titan_vlm.errors import CheckpointError, ConfigError
from titan_vlm.jsonl import Lines, open_until
from titan_vlm.training import manifest, storage

FILES = ("__0_0.distcp", ".metadata", "manifest.json")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def removed(path: Path) -> None:
    path.unlink()


def became_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_format(path: Path) -> None:
    path.write_text(json.dumps({"format": 99, "files": {}}))


DAMAGES = [truncated, emptied, flipped, removed, became_a_folder]
CASES = [(file, damage) for file in FILES for damage in DAMAGES]
CASES.append(("manifest.json", of_another_format))


def trained(directory, **settings) -> Run:
    """Saved after steps 1 and 2."""
    run = Run(directory, keep_latest_k=0, **settings)
    for step in (1, 2):
        run.train(1)
        run.save(step)
    run.checkpointer.close()
    return run


@pytest.mark.parametrize(("file", "damage"), CASES, ids=[f"{f} {d.__name__}" for f, d in CASES])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(
    file, damage, tmp_path, caplog
):
    trained(tmp_path)
    damage(tmp_path / "step-000002" / file)
    resumed = Run(tmp_path, seed=9)
    with caplog.at_level(logging.WARNING):
        assert resumed.resume() == 1
    expected = Run(tmp_path / "unused")
    expected.train(1)
    assert_same_bits(resumed, expected)
    assert (tmp_path / "step-000002.damaged").exists()
    assert "damaged checkpoint of step 2" in caplog.text and file in caplog.text
    [(kind, facts)] = resumed.events
    assert kind == "damaged" and facts["step"] == 2 and file in facts["problems"][0]
    resumed.train(1)
    resumed.save(2)  # and the run goes on over the place of the damaged one
    assert Run(tmp_path, seed=3).resume() == 2


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, caplog):
    """By a patch: the user of a test may be root, who may read everything."""
    trained(tmp_path)
    original = manifest.Storage.sha256

    def refuse(self, *names):
        if names == ("step-000002", "__0_0.distcp"):
            raise PermissionError(13, "Permission denied")
        return original(self, *names)

    monkeypatch.setattr(manifest.Storage, "sha256", refuse)
    resumed = Run(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resumed.resume() == 1
    assert "__0_0.distcp: Permission denied" in caplog.text


def test_where_all_are_damaged_nothing_begins_anew_behind_the_users_back(tmp_path):
    trained(tmp_path)
    flipped(tmp_path / "step-000001" / "__0_0.distcp")
    removed(tmp_path / "step-000002" / ".metadata")
    for _ in range(2):  # nor at the second attempt
        with pytest.raises(ConfigError, match="all checkpoints .* step 2: .metadata is missing"):
            Run(tmp_path).resume()


def test_a_folder_without_manifest_was_never_a_checkpoint_of_an_object_store(tmp_path):
    directory = f"memory://{tmp_path.name}"
    trained(directory)
    store = fsspec.filesystem("memory")
    store.rm_file(f"/{tmp_path.name}/step-000002/manifest.json")
    resumed = Run(directory)
    assert resumed.resume() == 1 and resumed.events == []
    resumed.train(1)
    resumed.save(2)
    assert Run(directory).resume() == 2


@pytest.mark.parametrize("async_save", [False, True])
def test_an_object_store_holds_the_same_run(tmp_path, async_save):
    directory = f"memory://{tmp_path.name}"
    run = trained(directory, async_save=async_save)
    resumed = Run(directory, seed=4)
    assert resumed.resume() == 2
    assert_same_bits(resumed, run)
    store = fsspec.filesystem("memory")
    path = f"/{tmp_path.name}/step-000002/__0_0.distcp"
    data = bytearray(store.cat_file(path))
    data[len(data) // 2] ^= 1
    store.pipe_file(path, bytes(data))
    again = Run(directory, seed=5)
    assert again.resume() == 1
    assert "another checksum" in again.events[0][1]["problems"][0]
    again.train(1)
    again.save(2)  # and the run goes on without touching the damaged one
    assert store.cat_file(f"/{tmp_path.name}/step-000002.damaged/__0_0.distcp") == bytes(data)
    assert store.exists(f"/{tmp_path.name}/step-000002.damaged/manifest.json")
    assert Run(directory).resume() == 2


def test_only_the_latest_are_kept_in_an_object_store(tmp_path):
    directory = f"memory://{tmp_path.name}"
    run = Run(directory, keep_latest_k=1)
    for step in (1, 2, 3):
        run.save(step)
    assert run.checkpointer.history.steps() == [3]
    assert fsspec.filesystem("memory").ls(f"/{tmp_path.name}", detail=False) == [
        f"/{tmp_path.name}/step-000003"
    ]


def test_an_address_that_no_package_serves_is_one_line():
    with pytest.raises(ConfigError, match="checkpoint.directory = nowhere://x: .*nowhere"):
        Run("nowhere://x")


def test_a_checkpoint_makes_no_object_that_is_not_its_own(tmp_path):
    """A pickle can call any function when it is read."""
    trained(tmp_path)
    marker = tmp_path / "called"
    code = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (tmp_path / "step-000002" / ".metadata").write_bytes(code.encode())
    with pytest.raises(Exception, match=r"(os|posix).system has no place in a checkpoint"):
        Run(tmp_path).load(2)
    assert not marker.exists()


# ---------------------------------------------------------------------------- going back


def test_going_back_to_a_step_leaves_the_later_ones_where_nobody_takes_them_up(tmp_path):
    trained(tmp_path)
    run = Run(tmp_path, resume="1")
    assert run.resume() == 1
    assert run.checkpointer.history.steps() == [1]
    assert (tmp_path / "step-000002.abandoned" / "manifest.json").exists()


@pytest.mark.parametrize("one", ["1", "0001"])
def test_the_command_that_went_back_goes_on_when_it_is_started_again(tmp_path, one):
    """Else each automatic restart would go back anew."""
    trained(tmp_path)
    run = Run(tmp_path, resume=one, keep_latest_k=0)
    assert run.resume() == 1
    for step in (2, 3):
        run.train(1)
        run.save(step)
    assert Run(tmp_path, resume=one).resume() == 3
    assert Run(tmp_path, resume="2").resume() == 2


def test_a_start_that_is_refused_has_not_gone_back(tmp_path):
    changes = {"training__steps": "3", "checkpoint__every": "1", "checkpoint__keep_latest_k": "0"}
    changes |= {"checkpoint__export_hf": "false", "training__global_batch_size": "1"}
    assert small_run.run(tmp_path, **changes) == 0
    folders = [f"step-{step:06d}" for step in (1, 2, 3)]
    assert small_run.run(tmp_path, **changes, checkpoint__resume="1", run__seed="9") == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == folders
    assert small_run.run(tmp_path, **changes, checkpoint__resume="1") == 0
    aside = [f"{name}.abandoned" for name in folders[1:]]
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert found == sorted(folders + aside)


def test_a_step_that_is_not_there_and_a_start_that_must_be_new_are_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ConfigError, match='resume = "7": .* has 1, 2'):
        Run(tmp_path, resume="7").resume()
    with pytest.raises(ConfigError, match='resume = "none": .* \\(newest: step 2'):
        Run(tmp_path, resume="none").resume()
    assert Run(tmp_path / "new", resume="none").resume() is None
    truncated(tmp_path / "step-000001" / ".metadata")
    with pytest.raises(ConfigError, match='resume = "1": that checkpoint is damaged: .metadata'):
        Run(tmp_path, resume="1").resume()


def test_every_nth_is_kept_and_never_the_one_resumed_from_is_pruned(tmp_path):
    run = Run(tmp_path, keep_latest_k=1, keep_every=4)
    for step in range(1, 7):
        run.save(step)
    assert run.checkpointer.history.steps() == [4, 6]
    run = Run(tmp_path, keep_latest_k=1)
    run.resume()
    for step in (7, 8):
        run.save(step)
    assert run.checkpointer.history.steps() == [6, 8]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    trained(tmp_path)
    for name in ("step-000001.old", "step-000003.tmp"):
        shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    assert Run(tmp_path).resume() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_nothing_is_removed_that_is_no_checkpoint(tmp_path, is_remote):
    """In the folder of others: it was once a bucket's root."""
    directory = f"memory://{tmp_path.name}" if is_remote else str(tmp_path)
    store, root = fsspec.core.url_to_fs(directory)
    theirs = ["notes.txt", "data/shard.tar", "weights.old/a.bin", "step-1.tmp/a", "step-000002x/a"]
    theirs += ["my-step-000002.tmp/a", "step-000009.abandoned/a"]
    half = f"step-000007{'' if is_remote else '.tmp'}/__0_0.distcp"
    for path in (*theirs, half):
        store.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        store.pipe_file(f"{root}/{path}", b"what is in it")
    trained(directory)
    assert Run(directory).resume() == 2
    left = [path.split(f"{tmp_path.name}/", 1)[1] for path in store.find(root)]
    assert sorted(path for path in left if path in theirs) == sorted(theirs)
    assert not any(path.startswith("step-000007") for path in left)


# ---------------------------------------------------------------------------- several disks


def test_nodes_that_do_not_share_the_folder_are_named_at_the_start(world, tmp_path):
    alike = world.run(2, find_on_own_disk, tmp_path, "disk0", "disk0")
    assert alike == [None, None] and list((tmp_path / "disk0").iterdir()) == []
    told = world.run(2, find_on_own_disk, tmp_path, "disk0", "disk1")
    for text in told:
        assert f"{tmp_path}/disk" in text and "rank 1 on " in text and "rank 0 on" not in text
        assert "cannot see what rank 0 wrote there; name a folder that all nodes share" in text


def find_on_own_disk(folder, *disks):
    distributed.start("cpu")
    try:
        return Run(folder / disks[int(os.environ["RANK"])]).checkpointer.history.find()
    except ConfigError as error:
        return str(error)


def test_a_save_of_which_files_are_elsewhere_is_none(world, tmp_path):
    """As where a disk is unmounted on one node, or two runs save into one folder."""
    for kinds, why, steps in world.run(2, save_on_own_disk, tmp_path):
        assert kinds == ["failed_save"] and steps == []
        assert "__1_0.distcp is missing: all nodes" in why and "__0_0.distcp" not in why
        assert "all nodes must share checkpoint.directory" in why


def save_on_own_disk(folder):
    distributed.start("cpu")
    run = Run(folder / f"disk{os.environ['RANK']}", max_failed_saves=9)
    run.save(1)
    return [e[0] for e in run.events], run.events[0][1]["why"], run.checkpointer.history.steps()


# ---------------------------------------------------------------------------- while saving


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_is_tried_again_at_the_next(tmp_path, monkeypatch, caplog, async_save):
    broken, original = [True], FileSystemWriter.write_data

    def write_data(self, *args):
        if broken:
            raise OSError(28, "No space left on device")
        return original(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    run = Run(tmp_path, max_failed_saves=3, async_save=async_save)
    for step in (1, 2):
        run.train(1)
        run.save(step)
        run.checkpointer.wait()
    assert [kind for kind, _ in run.events] == ["failed_save"] * 2
    assert "step 2 could not be saved (2 in a row): rank 0: OSError: [Errno 28]" in caplog.text
    broken.clear()
    run.save(2)  # the same step, tried again
    run.checkpointer.wait()
    broken.append(True)
    for step in (3, 4):
        run.save(step)
        run.checkpointer.wait()
    with pytest.raises(CheckpointError, match="3 saves in a row"):  # counted anew
        run.save(5)
        run.checkpointer.wait()
    assert run.checkpointer.history.latest() == 2


def test_a_last_save_that_fails_is_no_success(tmp_path, monkeypatch):
    run = Run(tmp_path, max_failed_saves=3)
    run.save(1)
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *_: 1 / 0)
    run.save(2)
    with pytest.raises(
        CheckpointError, match="division by zero; .* continues from the newest .* step 1"
    ):
        run.checkpointer.close()


def test_a_disk_slower_than_the_steps_leaves_saves_out_but_for_those_that_must_be(
    tmp_path, monkeypatch, caplog
):
    go, original = threading.Event(), FileSystemWriter.write_data

    def write_data(self, *args):
        assert go.wait(60)
        return original(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    run = Run(tmp_path, async_save=True)
    run.save(1)
    run.checkpointer.save(2, run.model, run.optimizer, {}, must=False)
    assert "step 2 is not saved: the last save is still being written" in caplog.text
    go.set()
    run.checkpointer.save(3, run.model, run.optimizer, {}, must=True)
    run.checkpointer.close()
    assert run.checkpointer.history.steps() == [1, 3]


ON_A_FULL_DISK = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.toy_run import Run
    run = Run({directory!r}, max_failed_saves=9, keep_latest_k=1)
    run.save(1)
    filler = open({directory!r} + "/filler", "wb", buffering=0)
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
    run.train(1)
    run.save(2)
    print(run.events[-1], run.checkpointer.history.steps())
    filler.truncate(0)
    run.save(2)
    print(run.events[-1][0], run.checkpointer.history.steps())
"""


def test_a_full_disk_costs_a_save_and_not_the_run(tmp_path):
    """A file system of 1 MiB, in a name space of its own."""
    script = tmp_path / "script.py"
    mount = tmp_path / "mount"
    mount.mkdir()
    root = str(Path(__file__).parents[2])
    script.write_text(textwrap.dedent(ON_A_FULL_DISK).format(root=root, directory=str(mount)))
    shell = f"mount -t tmpfs -o size=1m tmpfs {mount} && exec {sys.executable} {script}"
    tool = shutil.which("unshare")
    probe = [tool, "-rm", "mount", "-t", "tmpfs", "tmpfs", str(mount)]
    if not tool or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs unshare and the right to mount")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [tool, "-rm", "sh", "-c", shell], capture_output=True, text=True, env=environment
    )
    failed, saved = done.stdout.splitlines()
    assert failed.startswith("('failed_save'") and failed.endswith("[1]")
    assert "No space left on device" in failed
    assert saved == "save [2]"


def test_a_save_that_fails_leaves_no_room_taken_and_says_why(tmp_path, monkeypatch, caplog):
    """PyTorch's writer hides the error of the disk behind one of its own."""

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 5000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(storage, "open", Full, raising=False)
    run = Run(tmp_path, max_failed_saves=9)
    run.save(1)
    assert "No space left on device" in caplog.text and "unexpected pos" not in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_the_storage_says_of_connections_is_not_a_peer_that_died(tmp_path, monkeypatch):
    run = Run(tmp_path / "gloo", max_failed_saves=9)

    def write_data(self, *args):
        raise ConnectionResetError(104, "Connection reset by peer", str(tmp_path))

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    run.save(1)
    assert run.events[-1][0] == "failed_save"


def test_pruning_that_fails_costs_space_only(tmp_path, monkeypatch, caplog):
    def remove(self, name):
        raise RuntimeError("503")  # object stores have errors of their own

    run = Run(tmp_path, keep_latest_k=1)
    run.save(1)
    monkeypatch.setattr(storage.Storage, "remove", remove)
    monkeypatch.setattr(storage.Storage, "temporary", lambda self, name: name + ".tmp")
    run.save(2)
    assert "remain: 503" in caplog.text
    assert run.checkpointer.history.steps() == [1, 2] and [e[0] for e in run.events] == [
        "save",
        "save",
    ]


def test_a_read_that_fails_once_damages_nothing(tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setattr(manifest, "PAUSES_S", (0.0, 0.0))
    original, failed = manifest.Storage.sha256, []

    def sha256(self, *names):
        if len(failed) < 2:
            failed.append(names)
            raise OSError(116, "Stale file handle")
        return original(self, *names)

    monkeypatch.setattr(manifest.Storage, "sha256", sha256)
    resumed = Run(tmp_path)
    assert resumed.resume() == 2 and len(failed) == 2 and not resumed.events


def test_a_start_that_must_be_new_may_be_started_again_by_torchrun(tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Run(tmp_path, resume="none").resume() == 2


def test_a_start_that_was_refused_is_refused_again_when_it_is_started_again(tmp_path, monkeypatch):
    """With --max-restarts torchrun starts a command again that was refused."""
    trained(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    with pytest.raises(ConfigError, match='resume = "none"'):
        Run(tmp_path / "run", resume="none").resume()
    launched.set_up()
    assert Run(tmp_path / "run", resume="none").resume() == 2


def test_a_node_that_joins_a_run_that_must_be_new_goes_on_with_the_others(world, tmp_path):
    """torchrun counts restarts by node, and none at all where nodes join."""
    trained(tmp_path / "run")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "begun").touch()
    (tmp_path / "new").mkdir()
    assert world.run(2, find_on_old_and_new_node, tmp_path) == [2, 2]


def find_on_old_and_new_node(folder):
    os.environ[launched.FOLDER] = str(folder / ("old", "new")[int(os.environ["RANK"])])
    try:
        distributed.start("cpu")
        return Run(folder / "run", resume="none").checkpointer.history.find()
    finally:
        del os.environ[launched.FOLDER]


def test_metadata_is_written_before_it_is_synced(tmp_path, monkeypatch):
    sizes, original = [], os.fsync

    def fsync(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Run(tmp_path).save(1)
    assert all(sizes)


def test_lines_that_a_full_disk_does_not_take_wait(tmp_path, caplog):
    lines = Lines(tmp_path / "a.jsonl")
    lines.write({"step": 1})
    whole = lines._file

    class Full:
        def write(self, data):
            if len(data) > 3:
                return whole.write(data[:3])  # a torn line
            raise OSError(28, "No space left on device")

    lines._file = Full()
    lines.write({"step": 2})
    assert "No space left on device" in caplog.text
    lines._file = whole
    lines.write({"step": 3})
    lines.close()
    text = (tmp_path / "a.jsonl").read_text()
    assert text == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_torn_lines_anywhere_cost_themselves_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"st\n\0\0\n{"step": 2}\n{"step": 9}\n{"ste')
    open_until(path, 5).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
