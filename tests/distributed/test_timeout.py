"""`comm.timeout_s`."""

import torch


def test_the_timeout_reaches_every_process_group(world, tmp_path):
    """Those of the mesh's axes, those flattened later, and that of checkpoints."""
    for timeouts in world.run(4, timeouts_s, tmp_path):
        assert len(timeouts) == 6
        assert set(timeouts.values()) == {77}


def timeouts_s(output):
    import torch.distributed as dist

    from titan_vlm import distributed
    from titan_vlm.config import Checkpoint, Comm
    from titan_vlm.mesh import AXES, build_mesh
    from titan_vlm.training.checkpoint import Checkpointer

    device = distributed.start("cpu", Comm(timeout_s=77))
    mesh = build_mesh(device.type, dict.fromkeys(AXES, 1) | {"ep": 2, "tp": 2}, False)
    assert mesh.batch.size() == 2
    Checkpointer(output, Checkpoint())
    dist.barrier()  # whoever leaves first would close the connections that others are still making
    return {
        f"{group.group_desc} {group.group_name}": group._get_backend(
            torch.device("cpu")
        ).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
    }
