"""Every collective, form and dtype, over oneCCL and Gloo, against what plain torch computes."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import reduce

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from backends_here import BACKENDS
from torch import Tensor
from torch.distributed import ReduceOp
from worlds import run_world

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.bool, torch.complex64, torch.uint16]
REDUCED: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def values(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small integers, which every dtype holds and every order of summation sums alike."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(0, 4, (count,), generator=generator).to(dtype)


def reductions(rank: int, size: int) -> None:
    for dtype in [*INTEGERS, *FLOATS]:
        for op, combine in REDUCED.items():
            if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR) and dtype.is_floating_point:
                continue
            for count in (0, 1, 1000):
                tensor = values(rank, count, dtype)
                dist.all_reduce(tensor, op=op)
                wanted = reduce(combine, [values(r, count, dtype) for r in range(size)])
                assert torch.equal(tensor, wanted), (dtype, op, count)


def other_reductions(rank: int, size: int) -> None:
    flags = torch.tensor([True, rank == 0, False])
    dist.all_reduce(flags)
    assert flags.tolist() == [True, True, False]
    flags = torch.tensor([True, rank == 0, False])
    dist.all_reduce(flags, op=ReduceOp.PRODUCT)
    assert flags.tolist() == [True, size == 1, False]
    for dtype in (torch.float32, torch.int64):
        mean = torch.tensor([2 * rank, 5], dtype=dtype)
        dist.all_reduce(mean, op=ReduceOp.AVG)
        assert mean.tolist() == [size - 1, 5]
    turned = torch.arange(6.0).view(2, 3).t() + rank
    dist.all_reduce(turned)
    assert torch.equal(turned, size * torch.arange(6.0).view(2, 3).t() + sum(range(size)))
    pair = torch.tensor([1 + 2j, 3j])
    dist.all_reduce(pair)
    assert pair.tolist() == [size * (1 + 2j), size * 3j]


def reductions_to_one(rank: int, size: int) -> None:
    for root in range(size):
        for op in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.MAX):
            tensor = torch.tensor([float(rank), 2.0])
            dist.reduce(tensor, dst=root, op=op)
            whole = {ReduceOp.SUM: [sum(range(size)), 2.0 * size], ReduceOp.MAX: [size - 1, 2.0]}
            wanted = whole.get(op, [sum(range(size)) / size, 2.0])
            assert tensor.tolist() == (wanted if rank == root else [float(rank), 2.0])


def scattered_reductions(rank: int, size: int) -> None:
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.int16):
        for width in (0, 1, 5):
            source = values(rank, size * width, dtype)
            wanted = sum(values(r, size * width, dtype) for r in range(size)).view(size, -1)[rank]
            part = torch.empty(width, dtype=dtype)
            dist.reduce_scatter_tensor(part, source)
            assert torch.equal(part, wanted.to(dtype))
            part = torch.empty(width, dtype=dtype)
            dist.reduce_scatter(part, list(source.chunk(size) if width else [source] * size))
            assert torch.equal(part, wanted.to(dtype))
    uneven = torch.empty(rank + 1)
    dist.reduce_scatter(uneven, [torch.full((r + 1,), float(rank)) for r in range(size)])
    assert uneven.tolist() == [float(sum(range(size)))] * (rank + 1)


def gathers(rank: int, size: int) -> None:
    for dtype in [*INTEGERS, *FLOATS, *OTHERS]:
        own = values(rank, rank * 3, dtype)  # rank 0 has nothing to give
        everyone = [torch.empty(r * 3, dtype=dtype) for r in range(size)]
        dist.all_gather(everyone, own)
        assert all(torch.equal(got, values(r, r * 3, dtype)) for r, got in enumerate(everyone))
        whole = torch.empty(size * 4, dtype=dtype)
        dist.all_gather_into_tensor(whole, values(rank, 4, dtype))
        assert torch.equal(whole, torch.cat([values(r, 4, dtype) for r in range(size)]))
    rows = [torch.empty(2, 3) for _ in range(size)]
    dist.all_gather(rows, torch.full((3, 2), float(rank)).t())
    assert [row.unique().tolist() for row in rows] == [[float(r)] for r in range(size)]
    for root in range(size):
        lists = [torch.empty(r, 2) for r in range(size)] if rank == root else None
        dist.gather(torch.full((rank, 2), float(rank)), lists, dst=root)
        if lists is not None:
            assert [t.tolist() for t in lists] == [[[float(r)] * 2] * r for r in range(size)]


def exchanges(rank: int, size: int) -> None:
    for dtype in (torch.float32, torch.int64, torch.int8, torch.bfloat16, torch.bool):
        # Rank i gives rank j (i + j) % 3 rows: some give and get nothing.
        gives = [(rank + j) % 3 for j in range(size)]
        source = torch.cat([values(rank, 2 * n, dtype, j).view(n, 2) for j, n in enumerate(gives)])
        got = torch.empty(sum(gives), 2, dtype=dtype)  # it gets as many: i + j is symmetric
        dist.all_to_all_single(got, source, gives, gives)
        parts = [values(j, 2 * n, dtype, rank).view(n, 2) for j, n in enumerate(gives)]
        assert torch.equal(got, torch.cat(parts))
        listed = [torch.empty(n, 2, dtype=dtype) for n in gives]
        dist.all_to_all(listed, list(source.split(gives)))
        assert all(map(torch.equal, listed, parts))
    equal = torch.empty(2 * size)
    dist.all_to_all_single(equal, torch.arange(2.0 * size) + 100 * rank)
    assert equal.view(size, 2)[:, 0].tolist() == [100.0 * r + 2 * rank for r in range(size)]
    nothing = torch.empty(0)
    dist.all_to_all_single(nothing, torch.empty(0), [0] * size, [0] * size)


def copies(rank: int, size: int) -> None:
    for root in range(size):
        tensor = torch.full((2, 3), float(rank)).t()
        dist.broadcast(tensor, src=root)
        assert tensor.unique().tolist() == [float(root)]
        part = torch.empty(rank + 1)
        whole = [torch.full((r + 1,), 10.0 * r) for r in range(size)] if rank == root else None
        dist.scatter(part, whole, src=root)
        assert part.tolist() == [10.0 * rank] * (rank + 1)
    dist.broadcast(torch.empty(0), src=0)


def objects(rank: int, size: int) -> None:
    everyone: list[object] = [None] * size
    dist.all_gather_object(everyone, {"rank": rank, "pad": "x" * rank})
    assert everyone == [{"rank": r, "pad": "x" * r} for r in range(size)]
    told: list[object] = [("from", rank)]
    dist.broadcast_object_list(told, src=size - 1)
    assert told == [("from", size - 1)]
    given: list[object] = [None]
    dist.scatter_object_list(given, [f"to {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert given == [f"to {rank}"]
    found: list[object] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank, found, dst=0)
    assert found == (list(range(size)) if rank == 0 else None)


def coalesced(rank: int, size: int) -> None:
    several = [torch.full((n,), float(rank)) for n in (1, 0, 7)]
    dist.all_reduce_coalesced(several)
    assert [t.tolist() for t in several] == [[float(sum(range(size)))] * n for n in (1, 0, 7)]
    first, second = torch.ones(3), torch.full((2,), float(rank))
    with dist._coalescing_manager(async_ops=True) as work:
        dist.all_reduce(first)
        dist.all_reduce(second)
    work.wait()
    assert (first.tolist(), second.tolist()) == ([size] * 3, [sum(range(size))] * 2)
    outputs = [torch.empty(size * n) for n in (2, 3)]
    with dist._coalescing_manager():
        for n, output in zip((2, 3), outputs, strict=True):
            dist.all_gather_into_tensor(output, torch.full((n,), float(rank)))
    assert [o.tolist() for o in outputs] == [
        [float(r) for r in range(size) for _ in range(n)] for n in (2, 3)
    ]


def messages(rank: int, size: int) -> None:
    if size == 1:
        return
    right, left = (rank + 1) % size, (rank - 1) % size
    # Several of different sizes under way at once, mixed with collectives.
    got = [torch.empty(n, dtype=torch.int64) for n in (4, 1, 9)]
    receives = [dist.irecv(tensor, left) for tensor in got]
    total = torch.ones(1)
    dist.all_reduce(total)
    sends = [dist.isend(torch.arange(n) + rank, right) for n in (4, 1, 9)]
    for work in [*receives, *sends]:
        work.wait()
    assert all(torch.equal(tensor, torch.arange(len(tensor)) + left) for tensor in got)
    if rank == 0:
        dist.send(torch.tensor([True, False]), 1)
    if rank == 1:
        flags = torch.zeros(2, dtype=torch.bool)
        assert dist.recv(flags, 0) == 0
        assert flags.tolist() == [True, False]
    incoming = torch.empty(3)
    batch = [
        dist.P2POp(dist.isend, torch.full((3,), float(rank)), right),
        dist.P2POp(dist.irecv, incoming, left),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    assert incoming.tolist() == [float(left)] * 3


def asynchronous(rank: int, size: int) -> None:
    tensors = [torch.full((1 + 977 * i,), float(rank)) for i in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all(tensor.unique().tolist() == [sum(range(size))] for tensor in tensors)
    # It ends although nobody waits.
    alone = torch.ones(100_000)
    work = dist.all_reduce(alone, async_op=True)
    deadline = time.monotonic() + 15
    while not work.is_completed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert alone.unique().tolist() == [size]
    turned = torch.ones(2, 3).t()
    work = dist.all_reduce(turned, async_op=True)
    while not work.is_completed():
        time.sleep(0.01)
    assert turned.unique().tolist() == [size]


def futures(rank: int, size: int) -> None:
    tensor = torch.full((3,), float(rank))
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda ended: ended.value()[0] * 2)
    assert doubled.wait().tolist() == [2.0 * sum(range(size))] * 3
    # Chained: the second collective starts when the first has ended.
    started = threading.Event()
    mean = torch.ones(1)
    work = dist.all_reduce(mean, async_op=True)
    work.get_future().add_done_callback(lambda _: started.set())
    assert started.wait(15)
    work.wait()
    pieces = [torch.empty(r) for r in range(size)]
    gathered = dist.all_gather(pieces, torch.full((rank,), 1.0), async_op=True).get_future()
    gathered.wait()
    assert [piece.sum().item() for piece in pieces] == list(range(size))


def groups(rank: int, size: int) -> None:
    lower = dist.new_group([r for r in range(size) if r <= size // 2])
    upper = dist.new_group([r for r in range(size) if r >= size // 2])
    counts = torch.ones(1), torch.ones(1), torch.ones(1)
    works = [dist.all_reduce(counts[0], async_op=True)]
    if rank <= size // 2:
        works.append(dist.all_reduce(counts[1], group=lower, async_op=True))
    if rank >= size // 2:
        works.append(dist.all_reduce(counts[2], group=upper, async_op=True))
    for work in reversed(works):
        work.wait()
    inside = [size, size // 2 + 1 if rank <= size // 2 else 1]
    assert [count.item() for count in counts[:2]] == inside
    if rank >= size // 2:
        assert counts[2].item() == size - size // 2
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, src=size - 1, group=upper)
        assert tensor.item() == size - 1
        assert upper.group_name != dist.group.WORLD.group_name


def functionals(rank: int, size: int) -> None:
    ones = torch.ones(4) + rank
    world = dist.group.WORLD
    summed = functional.all_reduce(ones, "sum", world)
    assert (summed + 0).tolist() == [size + sum(range(size))] * 4
    gathered = functional.all_gather_tensor(ones[:2], gather_dim=0, group=world)
    assert (gathered + 0).tolist() == [1.0 + r for r in range(size) for _ in range(2)]
    part = functional.reduce_scatter_tensor(torch.ones(2 * size), "sum", 0, world)
    assert (part + 0).tolist() == [size, size]
    swapped = functional.all_to_all_single(torch.arange(float(size)), None, None, world)
    assert (swapped + 0).tolist() == [float(rank)] * size


def waits_with_a_limit(rank: int, size: int) -> None:
    dist.barrier()
    if size > 1 and rank == 1:
        time.sleep(0.5)
    tensor = torch.ones(2)
    work = dist.all_reduce(tensor, async_op=True)
    if size > 1 and rank != 1:
        with pytest.raises(dist.DistBackendError, match=r"still under way after 0\.05 s"):
            work.wait(timedelta(seconds=0.05))
    work.wait()
    assert tensor.tolist() == [size, size]


def refusals(rank: int, size: int) -> None:
    """Wrong arguments are refused on the spot, and the group goes on."""
    with pytest.raises(ValueError, match="splits sum to 3, the tensor has 4 rows"):
        dist.all_to_all_single(torch.ones(4), torch.ones(4), [4] + [0] * (size - 1),
                               [3] + [0] * (size - 1))  # fmt: skip
    with pytest.raises(ValueError, match="dense tensors on the CPU"):
        dist.all_reduce(torch.ones(2).to_sparse())
    with pytest.raises(ValueError, match="known to NCCL"):
        dist.all_reduce(torch.ones(2), op=dist._make_nccl_premul_sum(2.0))
    with pytest.raises(ValueError, match="has no meaning"):
        dist.all_reduce(torch.ones(2), op=ReduceOp.BAND)
    with pytest.raises(NotImplementedError, match="name the rank"):
        dist.recv(torch.ones(1))
    token = torch.ones(1)
    dist.all_reduce(token)
    assert token.item() == size


CHECKS = [
    reductions, other_reductions, reductions_to_one, scattered_reductions, gathers, exchanges,
    copies, objects, coalesced, messages, asynchronous, futures, groups, functionals,
    waits_with_a_limit, refusals,
]  # fmt: skip


def everything(rank: int, size: int, *, without: str = "") -> None:
    for check in CHECKS:
        if check.__name__ != without:
            check(rank, size)
            dist.barrier()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_collectives(backend: str, size: int) -> None:
    run_world(everything, size, backend=backend, timeout=120)


@pytest.mark.parametrize("backend", BACKENDS)
def test_collectives_in_the_checking_mode(backend: str) -> None:
    # There a collective starts when all ranks have called it: what is late is late at the start.
    environment = {"DQRM_COMM_CHECK": "1"}
    late = waits_with_a_limit.__name__
    run_world(everything, 2, backend=backend, timeout=120, environment=environment, without=late)
