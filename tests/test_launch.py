"""Which process this is: from torchrun's variables, from Slurm's, or alone."""

import pytest

from dqrm.launch import LaunchError, Place, find_place, started_by_us

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-09,12],login1", "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_nothing_said_is_a_world_of_one():
    assert find_place({}) == Place()
    # A batch script's own shell, or one task.
    assert find_place({**SLURM, "SLURM_NTASKS": "1"}) == Place()
    assert find_place({"SLURM_NTASKS": "8"}) == Place()


def test_torchrun_and_operators_that_set_less():
    assert find_place(dict(TORCHRUN)) == Place(3, 4, 1, 2)
    less = {k: v for k, v in TORCHRUN.items() if not k.startswith("LOCAL")}
    assert find_place(less) == Place(3, 4, 0, 1)
    # torchrun inside a Slurm job.
    assert find_place({**SLURM, **TORCHRUN}) == Place(3, 4, 1, 2)


def test_slurm_is_put_into_torchruns_words():
    environment = dict(SLURM)
    assert find_place(environment) == Place(3, 5, 1, 2)
    assert environment["MASTER_ADDR"] == "node07"
    assert 20_000 <= int(environment["MASTER_PORT"]) < 50_000
    assert find_place({**SLURM, "SLURM_NODEID": "2"}).local_world_size == 1
    for nodes, first in (("a1", "a1"), ("a1,a2", "a1"), ("rack[1-2]n", "rack1")):
        environment = {**SLURM, "SLURM_STEP_NODELIST": nodes}
        find_place(environment)
        assert environment["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 with WORLD_SIZE=4"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many' is no number"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "not MASTER_ADDR: where does rank 0 listen"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "start with srun"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "x2"}, "'x2' is not understood"),
    ],
)
def test_what_is_missing_is_named(environment, message):
    with pytest.raises(LaunchError, match=message):
        find_place(dict(environment))


def test_only_our_own_workers_are_ours():
    assert started_by_us({"TORCHELASTIC_RUN_ID": "dqrm-77"})
    assert not started_by_us({"TORCHELASTIC_RUN_ID": "none"})
    assert not started_by_us({})
