"""Row-sparse gradients as bytes: the definition's bytes and bits at every level, and no others."""

import random

import pytest
import torch
from torch import Tensor

from dqrm.kernels.rounding import step_key
from dqrm.kernels.row_messages import (
    MalformedRowsError,
    encode_rows,
    hash_bytes,
    merge_messages,
    order_rows,
    row_message_bound,
)
from dqrm.kernels.row_messages_reference import (
    decode_rows_reference,
    encode_rows_reference,
    merge_messages_reference,
    pack_keys_reference,
    unpack_keys_reference,
)
from dqrm.kernels.tables import RowGradient
from dqrm.kernels.xxh64 import xxh64_reference

KEY = step_key(3, 14)
BITS = (32, 16, 8, 4)
LIMIT = 2**40


def gradient(count: int, dim: int, seed: int = 0, limit: int = 10**6) -> RowGradient:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, limit, (2 * count,), generator=generator).unique()
    rows = rows[torch.randperm(len(rows), generator=generator)[:count]].sort()[0]
    values = torch.randn(len(rows), dim, generator=generator)
    return RowGradient(rows, values * 10.0 ** torch.randint(-6, 3, (len(rows), 1)).float())


def room(count: int, dim: int, bits: int) -> Tensor:
    return torch.full((row_message_bound(count, dim, bits) + 3,), 0xA5, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def empty(count: int, dim: int) -> RowGradient:
    return RowGradient(torch.empty(count, dtype=torch.int64), torch.empty(count, dim))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 5, 16, 64])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 700])
def test_bytes_and_residuals_are_the_definitions(each_level, bits, dim, count):
    given = gradient(count, dim, seed=count)
    count = len(given.rows)
    kept = torch.randperm(3 * count + 1)[:count]
    slots = torch.where(torch.rand(count) < 0.5, kept, -1)
    residual = torch.randn(3 * count + 1, dim)
    expected_residual = residual.clone()
    expected, bad = encode_rows_reference(
        given, bits, slots=slots, residual=expected_residual, key=KEY
    )
    assert bad is None
    for level in each_level():
        for threads in (1, 3):
            out, own = room(count, dim, bits), residual.clone()
            size, bad = encode_rows(
                given, out, bits=bits, slots=slots, residual=own, key=KEY, threads=threads
            )
            assert bad is None
            assert as_bytes(out[:size]) == expected, (level, threads)
            assert as_bytes(own) == as_bytes(expected_residual), (level, threads)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("world", "dim"), [(1, 16), (2, 16), (3, 7), (5, 33)])
def test_merging_adds_in_the_order_of_the_messages(each_level, bits, world, dim):
    counts = [0, 900, 400, 1, 300][-world:]
    gradients = [gradient(n, dim, seed=n, limit=1500) for n in counts]
    payloads = [encode_rows_reference(part, bits)[0] for part in gradients]
    described = [(p, len(g.rows), 0) for p, g in zip(payloads, gradients, strict=True)]
    expected = merge_messages_reference(described, dim, bits, 1500, 1, 1 / 3)
    buffer = torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.uint8)
    at, messages = 0, []
    for payload, count, offset in described:
        messages.append((at, len(payload), count, offset))
        at += len(payload)
    for level in each_level():
        for threads in (1, 2):
            out = empty(sum(counts) + 1, dim)
            got = merge_messages(
                buffer, messages, out, bits=bits, limit=1500, alpha=1 / 3, threads=threads
            )
            assert torch.equal(got.rows, expected.rows)
            assert as_bytes(got.values) == as_bytes(expected.values), (level, threads)


def test_owners_get_their_rows_and_the_further_ones(each_level):
    given = gradient(500, 4, limit=2000)
    taken = set(given.rows.tolist())
    more_rows = torch.tensor([row for row in range(0, 2000, 37) if row not in taken])
    more = RowGradient(more_rows, torch.randn(len(more_rows), 4))
    rows = torch.cat([given.rows, more.rows])
    values = torch.cat([given.values, more.values])
    for _ in each_level():
        order, counts = order_rows(given, more, 3)
        begin = 0
        for owner, count in enumerate(counts.tolist()):
            mine = order[begin : begin + count]
            begin += count
            assert rows[mine].tolist() == sorted(r for r in rows.tolist() if r % 3 == owner)
            out = room(count, 4, 32)
            size, _ = encode_rows(
                given, out, bits=32, stride=3, offset=owner, more=more, order=mine
            )
            payload = as_bytes(out[:size])
            decoded = decode_rows_reference(payload, count, 4, 32, 2000, 3, owner)
            assert torch.equal(decoded.rows, rows[mine])
            assert torch.equal(decoded.values, values[mine])
        assert begin == len(rows)


def test_gaps_of_every_width_survive(each_level):
    rows = torch.tensor([0, 1, 256, 257, 513, 66049, 131586, 16908802, 2**39, 2**39 + 2**24])
    packed = pack_keys_reference(rows)
    assert torch.equal(unpack_keys_reference(packed, len(rows), LIMIT)[0], rows)
    values = torch.ones(len(rows), 1)
    for _ in each_level():
        out = room(len(rows), 1, 32)
        size, _ = encode_rows(RowGradient(rows, values), out, bits=32)
        assert as_bytes(out[: len(packed)]) == packed
        got = merge_messages(
            out, [(0, size, len(rows), 0)], empty(len(rows), 1), bits=32, limit=LIMIT
        )
        assert torch.equal(got.rows, rows)
        with pytest.raises(MalformedRowsError):
            merge_messages(
                out, [(0, size, len(rows), 0)], empty(len(rows), 1), bits=32, limit=int(rows[-1])
            )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named_and_not_remembered(each_level, bits, wrong):
    given = gradient(300, 16)
    given.values[[70, 200], [3, 15]] = wrong
    slots = torch.arange(300)
    for _ in each_level():
        residual = torch.ones(300, 16)
        _, bad = encode_rows(
            given, room(300, 16, bits), bits=bits, slots=slots, residual=residual, threads=2
        )
        assert bad == given.rows[70]
        assert residual.isfinite().all()
        assert not residual[70].any()


@pytest.mark.parametrize(
    "rows", [[3, 3], [4, 2], [-1, 2]], ids=["repeated", "descending", "negative"]
)
def test_rows_that_do_not_ascend_are_refused(each_level, rows):
    given = RowGradient(torch.tensor(rows), torch.zeros(2, 4))
    for _ in each_level():
        with pytest.raises(ValueError, match="must ascend without repeats"):
            encode_rows(given, room(2, 4, 8), bits=8)


def test_wrong_memory_is_refused(each_level):
    given = gradient(50, 4)
    for _ in each_level():
        with pytest.raises(ValueError, match="too small"):
            encode_rows(given, torch.empty(60, dtype=torch.uint8), bits=8)
        with pytest.raises(ValueError, match="inside residual"):
            encode_rows(
                given,
                room(50, 4, 8),
                bits=8,
                slots=torch.full((50,), 9),
                residual=torch.zeros(9, 4),
            )
        with pytest.raises(ValueError, match="outside bytes"):
            merge_messages(
                torch.empty(9, dtype=torch.uint8), [(5, 5, 1, 0)], empty(1, 4), bits=8, limit=9
            )
        with pytest.raises(ValueError, match="room for every row"):
            merge_messages(
                torch.zeros(90, dtype=torch.uint8), [(0, 90, 5, 0)], empty(4, 4), bits=8, limit=9
            )


def mutate(payload: bytes, rng: random.Random) -> bytes:
    data = bytearray(payload)
    match rng.randrange(4):
        case 0:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            data += rng.randbytes(rng.randint(1, 9))
        case _:
            data = bytearray(rng.randbytes(rng.randint(1, 300)))
    return bytes(data)


def test_damaged_messages_are_refused_or_read_as_the_plain_twin_reads_them(fuzz):
    def case(rng: random.Random) -> None:
        bits, dim, limit = rng.choice(BITS), rng.choice([1, 4, 16]), rng.choice([50, 5000, 2**40])
        given = gradient(rng.randint(1, 40), dim, seed=rng.randrange(10**6), limit=limit)
        count = len(given.rows)
        payload = mutate(encode_rows_reference(given, bits)[0], rng)
        claimed = rng.choice([count, count, rng.randrange(4 * len(payload) + 1)])
        try:
            expected = merge_messages_reference([(payload, claimed, 0)], dim, bits, limit, 1, 1.0)
        except MalformedRowsError:
            expected = None
        buffer = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
        message = (0, len(payload), claimed, 0)
        out = empty(claimed, dim)
        if expected is None:
            with pytest.raises(MalformedRowsError):
                merge_messages(buffer, [message], out, bits=bits, limit=limit)
            return
        got = merge_messages(buffer, [message], out, bits=bits, limit=limit)
        assert torch.equal(got.rows, expected.rows)
        assert torch.equal(got.values.nan_to_num(7.0), expected.values.nan_to_num(7.0))

    fuzz(case)


def test_hashes_are_xxh64(each_level):
    data = torch.arange(256, dtype=torch.uint8).repeat(3)
    for _ in each_level():
        for size in (0, 1, 7, 33, 700):
            assert hash_bytes(data[1 : 1 + size]) == xxh64_reference(
                data[1 : 1 + size].numpy().tobytes()
            )
