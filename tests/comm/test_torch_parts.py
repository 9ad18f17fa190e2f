"""What torch builds on process groups works over ours: DDP, DTensor, DCP, torchrun."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends_here import BACKENDS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

STEPS = 6


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 1))


def batches() -> tuple[Tensor, Tensor]:
    """Of every step, 12 rows: divisible by 1 to 4 ranks."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(STEPS, 12, 20, generator=generator)
    return inputs, torch.randn(STEPS, 12, 1, generator=generator)


def train(trained: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(trained(inputs[step]), targets[step]).backward()
        optimizer.step()
    return [parameter.detach() for parameter in trained.parameters()]


def ddp(rank: int, size: int, group: dist.ProcessGroup | None = None) -> None:
    inputs, targets = batches()
    single = train(model(), inputs, targets)
    rows = slice(rank * 12 // size, (rank + 1) * 12 // size)
    # Small buckets: several are under way at once.
    for options in ({"bucket_cap_mb": 1e-3}, {"gradient_as_bucket_view": True}):
        wrapped = DistributedDataParallel(model(), process_group=group, **options)
        together = train(wrapped, inputs[:, rows], targets[:, rows])
        for got, wanted in zip(together, single, strict=True):
            # Means over parts, summed in another order: a few roundings of 2^-24 apart.
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def ddp_beside(rank: int, size: int) -> None:
    """Over groups of every name, whatever the default group is over."""
    for name in ("watched_gloo", "gloo", dist.get_backend()):
        ddp(rank, size, dist.new_group(backend=name))


def ddp_hook(rank: int, size: int) -> None:
    """A communication hook gets its gradients through a future, as bfloat16 here."""
    wrapped = DistributedDataParallel(model(), bucket_cap_mb=1e-3)

    def halve(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent = bucket.buffer().to(torch.bfloat16).div_(size)
        future = dist.all_reduce(sent, async_op=True).get_future()
        return future.then(lambda ended: bucket.buffer().copy_(ended.value()[0]))

    wrapped.register_comm_hook(None, halve)
    inputs = batches()[0][0]
    wrapped(inputs).sum().backward()
    alone = model()
    alone(inputs).sum().backward()
    for got, wanted in zip(wrapped.parameters(), alone.parameters(), strict=True):
        # bfloat16 keeps 8 bits.
        torch.testing.assert_close(got.grad, wanted.grad, rtol=2**-7, atol=1e-3)


def ddp_uneven(rank: int, size: int) -> None:
    """Ranks with more batches than others go on alone."""
    wrapped = DistributedDataParallel(nn.Linear(3, 1))
    with wrapped.join():
        for _ in range(2 + rank):
            wrapped(torch.ones(1, 3)).sum().backward()


def dtensor(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(24.0).view(8, 3)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    assert rows.to_local().shape[0] in (8 // size, 8 // size + 1)
    assert torch.equal(rows.full_tensor(), whole)
    columns = rows.redistribute(mesh, [Shard(1)])
    assert torch.equal(columns.redistribute(mesh, [Replicate()]).to_local(), whole)
    assert torch.equal((rows.t() @ rows).full_tensor(), whole.t() @ whole)


def checkpoint(rank: int, size: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor, zeros

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(30.0).view(10, 3)
    dcp.save({"rows": distribute_tensor(whole, mesh, [Shard(0)]), "step": 7}, checkpoint_id=folder)
    found = {"rows": zeros(10, 3, device_mesh=mesh, placements=[Shard(1)]), "step": 0}
    dcp.load(found, checkpoint_id=folder)
    assert found["step"] == 7
    assert torch.equal(found["rows"].full_tensor(), whole)


def parts(rank: int, size: int, *, folder: str) -> None:
    ddp(rank, size)
    ddp_beside(rank, size)
    ddp_hook(rank, size)
    ddp_uneven(rank, size)
    dtensor(rank, size)
    checkpoint(rank, size, folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ddp_dtensor_and_dcp(backend: str, tmp_path: Path) -> None:
    run_world(parts, 2, backend=backend, timeout=120, folder=str(tmp_path / "checkpoint"))


def ddp_only(rank: int, size: int) -> None:
    ddp(rank, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ddp_in_four_processes(backend: str) -> None:
    run_world(ddp_only, 4, backend=backend, timeout=120)


SCRIPT = """
import torch, torch.distributed as dist
from dqrm.comm import process_group

def add_up(time):
    used = process_group.init({backend!r}, timeout=30)
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * 3
    # One write: those of two processes must not mix.
    line = f"time {{time}}: rank {{dist.get_rank()}} of {{dist.get_world_size()}} over {{used}}"
    print(line + chr(10), end="", flush=True)

add_up(1)
dist.destroy_process_group()
add_up(2)  # on the same store
# Ends without destroy_process_group, as many scripts do.
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_torchrun(backend: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(backend=backend))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in (f"time {time}: rank {rank} of 2" for time in (1, 2) for rank in (0, 1)):
        assert f"{line} over {backend}\n" in done.stdout
