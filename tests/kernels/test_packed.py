"""Packed look-ups: every level gives the bits of the plain twin, and refuses what it should."""

import math

import pytest
import torch
from torch import Tensor

from dqrm.kernels.code_layout import pack
from dqrm.kernels.packed import PackedTables

DIMS = [4, 5, 8, 10, 16, 19, 32, 37, 64, 96, 128, 256]
BITS = [2, 4, 8, 16, 32]
ROWS = [1, 7, 300, 2]


def bits_of(values: Tensor) -> Tensor:
    """The numbers' bits, with every NaN the same."""
    return torch.where(values.isnan(), math.nan, values).contiguous().view(torch.int32)


def random_codes(rows: int, dim: int, bits: int, seed: int) -> Tensor:
    """Packed codes that use the whole range, -n - 1 included; ordinary floats at 32 bits."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 32:
        return torch.randn(rows, dim, generator=generator)
    half = 1 << (bits - 1)
    return pack(torch.randint(-half, half, (rows, dim), generator=generator), bits)


def tables_of(
    dim: int,
    bits: list[int],
    *,
    rows: list[int] | None = None,
    per_row: bool = False,
    pooling: str = "sum",
    seed: int = 0,
) -> PackedTables:
    rows = rows or ROWS[: len(bits)]
    generator = torch.Generator().manual_seed(seed)
    codes = [
        random_codes(r, dim, b, seed + n) for n, (r, b) in enumerate(zip(rows, bits, strict=True))
    ]
    scales = [
        None if b == 32 else torch.rand(r if per_row else 1, generator=generator) + 0.01
        for r, b in zip(rows, bits, strict=True)
    ]
    names = [f"t{number}" for number in range(len(bits))]
    return PackedTables(codes, scales, bits, names, dim, pooling)


def batch_of(
    rows: list[int], samples: int, longest: int | None, seed: int = 0, dtype=torch.int64
) -> tuple[Tensor, Tensor | None]:
    """Random indices, and offsets of bags of 0 to ``longest`` ids."""
    generator = torch.Generator().manual_seed(seed)
    bags = len(rows) * samples
    if longest is None:
        lengths = torch.ones(bags, dtype=torch.int64)
    else:
        lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    per_table = lengths.view(len(rows), samples).sum(1).tolist() if samples else [0] * len(rows)
    ids = [
        torch.randint(0, r, (n,), generator=generator) for r, n in zip(rows, per_table, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat(ids).to(dtype), None if longest is None else offsets


@pytest.fixture
def check(each_level):
    """Compares every level with the plain twin, with and without a strided output."""

    def compare(make, indices, offsets=None, weights=None):
        for level in each_level():
            tables = make()
            expected = tables.look_up_reference(indices, offsets, weights=weights)
            got = tables.look_up(indices, offsets, weights=weights)
            assert got.shape == expected.shape
            assert torch.equal(bits_of(got), bits_of(expected)), level
            samples, count, dim = expected.shape
            room = torch.full((samples, count + 1, dim), 7.0)
            tables.look_up(indices, offsets, weights=weights, out=room[:, 1:])
            assert torch.equal(bits_of(room[:, 1:]), bits_of(expected)), level
            assert bool((room[:, 0] == 7).all()), level

    return compare


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_every_level_gives_the_bits_of_the_reference(check, bits, dim):
    for per_row in (False, True):
        for dtype in (torch.int32, torch.int64):
            one, offsets = batch_of(ROWS, 70, None, dtype=dtype)
            check(lambda: tables_of(dim, [bits] * 4, per_row=per_row), one)  # noqa: B023
            many, offsets = batch_of(ROWS, 70, 5, dtype=dtype)
            check(lambda: tables_of(dim, [bits] * 4, per_row=per_row), many, offsets)  # noqa: B023


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [5, 16, 64])
def test_means_and_weights(check, bits, dim):
    indices, offsets = batch_of(ROWS, 33, 9)
    check(lambda: tables_of(dim, [bits] * 4, pooling="mean"), indices, offsets)
    weights = torch.randn(indices.numel())
    check(lambda: tables_of(dim, [bits] * 4), indices, offsets, weights)
    one, _ = batch_of(ROWS, 33, None)
    check(lambda: tables_of(dim, [bits] * 4), one, None, torch.randn(one.numel()))


def test_tables_of_different_bits_in_one_call(check):
    rows = [3, 900, 40, 11, 5]
    indices, offsets = batch_of(rows, 130, 3)
    check(lambda: tables_of(16, BITS, rows=rows, per_row=True), indices, offsets)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(check, threads):
    rows = [5000, 20]
    indices, offsets = batch_of(rows, 9000, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(lambda: tables_of(20, [4, 8], rows=rows), indices, offsets)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("samples", [0, 1, 127, 128, 129, 257])
def test_batch_sizes_around_blocks(check, samples):
    indices, offsets = batch_of(ROWS, samples, 2)
    check(lambda: tables_of(16, [4] * 4), indices, offsets)
    one, _ = batch_of(ROWS, samples, None)
    check(lambda: tables_of(16, [4] * 4), one)


@pytest.mark.parametrize("dim", [16, 48, 128])
def test_outputs_too_large_for_the_caches(check, dim):
    """Those are written in another way, in several parts; 8 MiB and more."""
    samples = (9 << 20) // (dim * 4)
    ids = torch.randint(0, 300, (samples,))
    check(lambda: tables_of(dim, [4], rows=[300]), ids)
    offsets = torch.arange(0, samples + 1) // 2 * 2  # bags of two ids and of none
    offsets[-1] = samples
    check(lambda: tables_of(dim, [4], rows=[300]), ids, offsets)


def test_empty_bags_and_unused_tables_are_zero(check):
    offsets = torch.zeros(4 * 5 + 1, dtype=torch.int64)
    offsets[-1] = 2
    check(lambda: tables_of(16, [4] * 4), torch.tensor([1, 0]), offsets)
    offsets[:] = 0
    none = torch.empty(0, dtype=torch.int64)
    for pooling in ("sum", "mean"):
        check(lambda: tables_of(16, [4] * 4, pooling=pooling), none, offsets)  # noqa: B023
    assert tables_of(16, [4] * 4).look_up(none, offsets).count_nonzero() == 0


def test_one_bag_of_everything_and_all_duplicates(check):
    indices = torch.arange(300).repeat(3)
    check(lambda: tables_of(16, [4], rows=[300]), indices, torch.tensor([0, 900]))
    check(lambda: tables_of(16, [4], rows=[300]), torch.full((5000,), 299))


def test_unaligned_memory(check):
    for bits in BITS:
        memory = torch.zeros(4 * 301 * 10, dtype=torch.uint8)
        for shift in (1, 3) if bits in (2, 4, 8) else (0,):

            def make(bits=bits, memory=memory, shift=shift):
                codes = random_codes(301, 10, bits, 3)
                held = memory[shift : shift + codes.nbytes].view(codes.dtype).view(codes.shape)
                held.copy_(codes)
                scale = None if bits == 32 else torch.rand(301)[1:301].new_tensor([0.3])
                return PackedTables([held], [scale], [bits], ["t"], 10)

            check(make, torch.tensor([300, 0, 5]))


@pytest.mark.parametrize(
    "scale", [0.0, 1e-45, 1e-38, 3e38, math.inf, math.nan], ids=lambda scale: f"{scale:g}"
)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_extreme_scales(check, bits, scale):
    def make():
        codes = random_codes(50, 19, bits, 1)
        return PackedTables([codes], [torch.tensor([scale])], [bits], ["t"], 19)

    check(make, torch.arange(50))
    check(make, torch.arange(50), torch.arange(0, 51, 5))


def test_fp32_rows_keep_what_they_hold(check):
    rows = torch.tensor([[-0.0, math.inf, math.nan, 1e-45]])
    check(lambda: PackedTables([rows], [None], [32], ["t"], 4), torch.tensor([0, 0]))
    tables = PackedTables([rows], [None], [32], ["t"], 4)
    # A sum starts at zero, and 0 + -0 is 0.
    for offsets in (None, torch.tensor([0, 1])):
        assert math.copysign(1, float(tables.look_up(torch.tensor([0]), offsets)[0, 0, 0])) == 1


def test_by_hand():
    packed = pack(torch.tensor([[1, -8, 7, 0], [2, 3, -1, 5]]), 4)
    tables = PackedTables([packed], [torch.tensor([0.5])], [4], ["t"], 4)
    got = tables.look_up(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3]))
    assert got.tolist() == [[[0.5, -4.0, 3.5, 0.0]], [[2.0, 3.0, -1.0, 5.0]]]


BAD_BATCHES = {
    "id-at-end": (IndexError, r"id 7 is outside table 't1' of 7 rows", [0, 0, 6, 7, 0, 0], None),
    "id-negative": (IndexError, r"id -1 is outside table 't2' of 300", [0, 0, 0, 0, 0, -1], None),
    "id-huge": (IndexError, r"id 4294967296 is outside table 't0'", [1 << 32, 0, 0, 0, 0, 0], None),
    "indices-left-over": (ValueError, r"4 indices do not divide into 3 tables", [0] * 4, None),
    "offsets-few": (ValueError, r"got 3 numbers for 3 tables", [0] * 3, [0, 1, 3]),
    "offsets-none": (ValueError, r"got 0 numbers for 3 tables", [], []),
    "offsets-start": (ValueError, r"from 0 to 3, the number of indices", [0] * 3, [1, 1, 2, 3]),
    "offsets-end": (ValueError, r"from 0 to 3, the number of indices", [0] * 3, [0, 1, 2, 4]),
    "offsets-decrease": (ValueError, r"offsets decrease after bag 1", [0] * 3, [0, 3, 2, 3]),
    "offsets-outside": (ValueError, r"offsets decrease after bag 1", [0] * 3, [0, 9, 2, 3]),
    "id-in-bag": (IndexError, r"id 9 is outside table 't1'", [0, 0, 9], [0, 2, 3, 3]),
}


@pytest.mark.parametrize(
    ("error", "message", "indices", "offsets"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys()
)
def test_bad_batches_are_refused_and_nothing_written(each_level, error, message, indices, offsets):
    ids = torch.tensor(indices, dtype=torch.int64)
    bounds = None if offsets is None else torch.tensor(offsets, dtype=torch.int64)
    for _ in each_level():
        tables = tables_of(16, [4] * 3)
        samples = len(indices) // 3 if offsets is None else 1
        out = torch.full((samples, 3, 16), 7.0)
        with pytest.raises(error, match=message):
            tables.look_up(ids, bounds, out=out)
        assert bool((out == 7).all())
        with pytest.raises(error, match=message):
            tables.look_up_reference(ids, bounds)


def test_int32_ids_that_are_outside(each_level):
    for _ in each_level():
        for bad in (300, -1, -(1 << 31), (1 << 31) - 1):
            ids = torch.tensor([0] * 40 + [bad] + [0] * 300, dtype=torch.int32)
            with pytest.raises(IndexError, match=f"id {bad} is outside table 't0' of 300 rows"):
                tables_of(16, [4], rows=[300]).look_up(ids)


def test_wrong_tensors_are_refused():
    tables = tables_of(16, [4, 4])
    ids = torch.tensor([0, 0])
    with pytest.raises(TypeError, match=r"indices: must be int32 or int64, is torch.float32"):
        tables.look_up(torch.zeros(2))
    with pytest.raises(ValueError, match="indices: must have one dimension"):
        tables.look_up(ids.view(1, 2))
    with pytest.raises(TypeError, match="offsets: must be int32 or int64"):
        tables.look_up(ids, torch.zeros(3))
    with pytest.raises(TypeError, match="weights: must be float32"):
        tables.look_up(ids, weights=torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="3 weights for 2 indices"):
        tables.look_up(ids, weights=torch.ones(3))
    with pytest.raises(ValueError, match="a weighted mean is undefined"):
        tables_of(16, [4, 4], pooling="mean").look_up(ids, weights=torch.ones(2))
    with pytest.raises(TypeError, match="out: must be float32"):
        tables.look_up(ids, out=torch.empty(1, 2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out: must have shape \[1, 2, 16\], has \[2, 2, 16\]"):
        tables.look_up(ids, out=torch.empty(2, 2, 16))
    with pytest.raises(ValueError, match="must be contiguous"):
        tables.look_up(ids, out=torch.empty(1, 2, 32)[:, :, ::2])
    with pytest.raises(ValueError, match="must not overlap"):
        tables.look_up(
            torch.zeros(4, dtype=torch.int64), out=torch.empty(1, 2, 16).expand(2, 2, 16)
        )


BAD_TABLES = {
    "bits": ({"bits": 3}, "bits=3: must be 2, 4, 8, 16 or 32"),
    "dtype": ({"codes": torch.zeros(5, 8, dtype=torch.int8)}, "must be torch.uint8"),
    "width": ({"codes": torch.zeros(5, 7, dtype=torch.uint8)}, r"\[rows, 8\]; got"),
    "strided": ({"codes": torch.zeros(5, 16, dtype=torch.uint8)[:, ::2]}, "must be contiguous"),
    "no-scale": ({"scale": None}, "needs a float32 scale"),
    "scale-shape": ({"scale": torch.ones(4)}, r"scale must have shape \[1\] or \[5\], has \[4\]"),
    "fp32-scale": ({"bits": 32, "codes": torch.zeros(5, 16)}, "32-bit rows are the weights"),
    "pooling": ({"pooling": "max"}, "pooling='max'"),
    "dim": ({"dim": 0}, "embedding_dim=0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_wrong_tables_are_refused(change, message):
    good = {"codes": torch.zeros(5, 8, dtype=torch.uint8), "scale": torch.ones(1), "bits": 4}
    new = {**good, "dim": 16, "pooling": "sum", **change}
    with pytest.raises(ValueError, match=message):
        PackedTables(
            [new["codes"]], [new["scale"]], [new["bits"]], ["t"], new["dim"], new["pooling"]
        )
    with pytest.raises(ValueError, match="must be one of each a table"):
        PackedTables([], [], [], [], 16)


def test_the_reference_serves_without_the_compiled_module(monkeypatch, caplog):
    from dqrm.kernels import cpu, packed

    indices, offsets = batch_of(ROWS, 10, 3)
    expected = tables_of(16, [4] * 4).look_up(indices, offsets)
    monkeypatch.setattr(packed, "native", lambda: None)
    cpu.announce_fallback.cache_clear()
    out = torch.empty(10, 4, 16)
    assert tables_of(16, [4] * 4).look_up(indices, offsets, out=out) is out
    assert torch.equal(bits_of(out), bits_of(expected))
    assert caplog.text.count("torch operators do their work") == 1


def operator_arguments(with_offsets: bool, with_weights: bool):
    tables = tables_of(16, [4, 32], rows=[9, 4])
    indices, offsets = batch_of([9, 4], 6, 3 if with_offsets else None)
    weights = torch.rand(indices.numel()) if with_weights else None
    return (
        list(tables.codes),
        list(tables.scales),
        list(tables.bits),
        list(tables.names),
        16,
        "sum",
        indices,
        offsets,
        weights,
    )


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_the_operator_is_a_proper_one(with_offsets, with_weights):
    arguments = operator_arguments(with_offsets, with_weights)
    torch.library.opcheck(torch.ops.dqrm.packed_embedding_bag.default, arguments)
    tables = tables_of(16, [4, 32], rows=[9, 4])
    expected = tables.look_up(arguments[6], arguments[7], weights=arguments[8])
    assert torch.equal(torch.ops.dqrm.packed_embedding_bag(*arguments), expected)
