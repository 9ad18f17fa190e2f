"""All-to-all of integers and of quantized vectors, against what every rank knows was sent."""

import pytest
import torch
from backends_here import BACKENDS
from torch import distributed
from worlds import run_world

from dqrm.comm.message import HEADER_BYTES
from dqrm.comm.meter import Meter
from dqrm.comm.row_codec import Rows
from dqrm.comm.vectors import VectorExchange, exchange_integers
from dqrm.comm.wire import RefusedError, Wire
from dqrm.kernels.row_codecs_reference import quantize_rows_reference

CODECS = [Rows(32), Rows(16), Rows(8, "nearest"), Rows(4, "nearest"), Rows(8), Rows(4)]


def count_of(source: int, target: int, step: int) -> int:
    """Vectors of one rank for another; none for some."""
    return (source * 7 + target * 5 + step * 3) % 9 * 4 * (source != target or step > 1)


def vectors_of(source: int, target: int, step: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * source + target)
    return torch.randn(count_of(source, target, step), dim, generator=generator)


def expected_of(values: torch.Tensor, codec: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out where rounding is to nearest, and how far it may be off where it is not."""
    if codec.bits == 32:
        return values, torch.zeros(len(values), 1)
    if codec.bits == 16:
        return values.bfloat16().float(), torch.zeros(len(values), 1)
    if not len(values):
        return values, torch.zeros(0, 1)
    _, scales, residual = quantize_rows_reference(values, bits=codec.bits)
    off = 0.0 if codec.rounding == "nearest" else 1.5
    return values - residual, off * scales.float().unsqueeze(1)


def vectors_arrive(rank: int, world_size: int) -> None:
    ranks = range(world_size)
    for codec in CODECS:
        for dim in (16, 5):
            meter = Meter()
            wire = Wire(distributed.group.WORLD, meter)
            channel = VectorExchange(wire, f"v{dim}", dim, codec, seed=3)
            received_sizes = sent = raw = 0
            for step in range(3):
                counts = [count_of(rank, target, step) for target in ranks]
                coming = [count_of(source, rank, step) for source in ranks]
                values = torch.cat([vectors_of(rank, target, step, dim) for target in ranks])
                found = channel.send(values, counts, coming, step)
                whole = torch.cat([vectors_of(source, rank, step, dim) for source in ranks])
                wanted, tolerance = expected_of(whole, codec)
                assert ((found - wanted).abs() <= tolerance).all()
                if codec.bits < 16 and codec.rounding == "stochastic" and len(whole):
                    assert not torch.equal(found, wanted)
                for other in ranks:
                    if other != rank:
                        sent += channel.message_bytes(counts[other])
                        received_sizes += channel.message_bytes(coming[other])
                        raw += 4 * dim * counts[other]
            record = meter.record(f"v{dim}", "vectors")
            assert (record.messages, record.sent_bytes) == (3, sent)
            assert (record.received_bytes, record.raw_bytes) == (received_sizes, raw)
    assert channel.message_bytes(10) == HEADER_BYTES + 10 * (3 + 2)


def integers_arrive(rank: int, world_size: int) -> None:
    wire = Wire(distributed.group.WORLD, Meter())
    for step in range(4):
        lists = [
            torch.arange(count_of(rank, target, step) * 300, dtype=torch.int32) * (rank + 1)
            for target in range(world_size)
        ]
        received = exchange_integers(wire, "ids", lists, step)
        for source, numbers in enumerate(received):
            wanted = torch.arange(count_of(source, rank, step) * 300, dtype=torch.int32)
            assert torch.equal(numbers, wanted * (source + 1))


def refusals_are_told_to_all(rank: int, world_size: int) -> None:
    wire = Wire(distributed.group.WORLD, Meter())
    empty = [torch.empty(0, dtype=torch.int32)] * world_size
    with pytest.raises(RefusedError, match="rank 1: id 7 is outside"):
        exchange_integers(wire, "ids", empty, 0, "id 7 is outside" if rank == 1 else None)
    channel = VectorExchange(wire, "v", 16, Rows(8))
    values = torch.ones(8 * world_size, 16)
    if rank == 1:
        values[3, 4] = torch.inf
    with pytest.raises(RefusedError, match="rank 1: 'v' has NaN or infinity"):
        channel.send(values, [8] * world_size, [8] * world_size, 0)
    # What all refused together, all can go on from.
    assert (
        channel.send(torch.ones_like(values), [8] * world_size, [8] * world_size, 1).shape
        == values.shape
    )


def all_of_them(rank: int, world_size: int) -> None:
    vectors_arrive(rank, world_size)
    integers_arrive(rank, world_size)
    if world_size > 1:
        refusals_are_told_to_all(rank, world_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_vectors_and_integers_arrive(backend, world_size):
    run_world(all_of_them, world_size, backend=backend)
