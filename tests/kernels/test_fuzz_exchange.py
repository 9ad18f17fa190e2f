"""Random and malformed arguments into every native primitive of the gradient exchange.

Each call must either be refused with an error people can act on, nothing written, or do what the
same call does without the compiled module.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dqrm.kernels import cpu
from dqrm.kernels.block_codecs import block_code_bytes, dequantize_blocks, quantize_blocks
from dqrm.kernels.merge_rows import merge_rows
from dqrm.kernels.row_codecs import add_dequantized_rows, dequantize_rows, quantize_rows
from dqrm.kernels.row_codecs_reference import code_bytes
from dqrm.kernels.sign_codec import pack_signs, sign_blocks, unpack_signs

REFUSED = (ValueError, IndexError, TypeError)


def alike(left: object, right: object) -> bool:
    """Whether values, or the bits of tensors, are equal, with every NaN the same."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(alike, left, right))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left == right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point():
        left, right = (torch.where(side.isnan(), math.nan, side) for side in (left, right))
    return torch.equal(*(_bytes(side) for side in (left, right)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def close(left: Tensor, right: Tensor) -> bool:
    """As alike, but the scales of signs are sums whose order is not the reference's.

    Double sums of a few thousand values, rounded to float32, differ by one unit at most.
    """
    if left.is_floating_point():
        return torch.allclose(left, right, rtol=2**-22, atol=1e-37, equal_nan=True)
    return alike(left, right)


def compare(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    right: bool,
    same: Callable[[Tensor, Tensor], bool] = alike,
) -> None:
    """Call with the compiled module and without it on copies, and hold the two together."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    plain = arguments | {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        got = function(**arguments)
    except REFUSED as error:
        if right:
            raise
        for name, tensor in tensors.items():
            if not alike(tensor, before[name]):
                raise AssertionError(f"{name} was written in spite of {error}") from error
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "native", lambda: None)
        expected = function(**plain)
    assert alike(got, expected)
    for name, tensor in tensors.items():
        assert same(tensor, plain[name]), name


def spoil(rng: random.Random, arguments: dict[str, Any]) -> None:
    """Make one of the tensors wrong, or strange."""
    name = rng.choice([name for name, value in arguments.items() if isinstance(value, Tensor)])
    tensor = arguments[name]
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor[:-1],
        lambda: torch.cat([tensor, tensor[-1:]]),
        lambda: tensor[:0],
        lambda: tensor.repeat_interleave(2, dim=0)[::2],
        lambda: tensor.unsqueeze(0),
        lambda: tensor.reshape(-1),
        lambda: tensor.to(rng.choice([torch.float64, torch.int32, torch.int64, torch.float16])),
        lambda: tensor.flip(0),
    ]
    if tensor.numel() and tensor.dtype == torch.int64:
        wild = torch.tensor(rng.choice([-1, 2**40, -(2**63), 2**63 - 1]))
        changes += [lambda: tensor.index_fill(0, torch.tensor([0]), int(wild))] * 6
    if tensor.numel() and tensor.is_floating_point():
        wild = torch.tensor(rng.choice([math.nan, math.inf, -math.inf, 1e-42, -0.0, 3e38]))
        changes += [lambda: tensor.masked_fill(torch.rand(tensor.shape) < 0.1, float(wild))] * 6
    arguments[name] = rng.choice(changes)()


def numbers_of(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape) * rng.choice([1e-40, 1e-6, 1.0, 1e30])


def fuzz_merge_rows(rng: random.Random) -> None:
    count, dim = rng.choice([0, 1, 7, 300, 3000]), rng.choice([1, 4, 5, 16, 37])
    rows = torch.randint(0, rng.choice([1, 9, 10**6, 2**45]), (count,))
    arguments = {"rows": rows, "values": numbers_of(rng, count, dim)}
    if rng.random() < 0.5:
        room = count + rng.choice([0, 3])
        arguments |= {"out_rows": torch.zeros(room, dtype=torch.int64)}
        arguments |= {"out_values": torch.zeros(room, dim)}
    right = rng.random() < 0.4
    if not right:
        spoil(rng, arguments)
    # Both leave behind what they like in the room after the result.
    compare(merge_rows, arguments, right, lambda left, other: True)


def encoding(rng: random.Random, rows: int, dim: int) -> dict[str, Any]:
    """Arguments that all codecs of rows and blocks share."""
    bits = rng.choice([4, 8])
    scale_dtype = rng.choice([torch.float32, torch.bfloat16])
    codes = torch.randint(0, 256, (rows * code_bytes(dim, bits),), dtype=torch.uint8)
    scales = torch.rand(rows).to(scale_dtype)
    return {"codes": codes, "scales": scales, "bits": bits, "scale_dtype": scale_dtype}


def fuzz_quantize_rows(rng: random.Random) -> None:
    rows, dim = rng.choice([0, 1, 5, 200]), rng.choice([1, 2, 5, 16, 37, 64])
    arguments = encoding(rng, rows, dim) | {"values": numbers_of(rng, rows, dim)}
    if rng.random() < 0.5:
        carried = rng.random() < 0.5
        arguments |= {"residual": numbers_of(rng, rows, dim), "carried": carried}
    if rng.random() < 0.5:
        arguments["key"] = rng.randrange(2**63)
        if rng.random() < 0.5:
            arguments["numbers"] = torch.randint(0, 10**9, (rows,))
    right = rng.random() < 0.4
    if not right:
        spoil(rng, arguments)
    compare(quantize_rows, arguments, right)


def fuzz_dequantize_rows(rng: random.Random) -> None:
    rows, dim = rng.choice([0, 1, 5, 200]), rng.choice([1, 2, 5, 16, 37, 64])
    arguments = encoding(rng, rows, dim)
    right = rng.random() < 0.4
    if rng.random() < 0.5:
        arguments["out"] = numbers_of(rng, rows, dim)
        function: Callable[..., Any] = dequantize_rows
    else:
        height = rows + 3
        chosen = torch.randint(0, height, (rows,))
        if rng.random() < 0.5:
            chosen = torch.randperm(height)[:rows].sort().values
        arguments |= {"out": numbers_of(rng, height, dim), "rows": chosen, "alpha": rng.random()}
        function = add_dequantized_rows
    if not right:
        spoil(rng, arguments)
    compare(function, arguments, right)


def fuzz_blocks(rng: random.Random) -> None:
    count, block = rng.choice([0, 1, 7, 256, 1000]), rng.choice([1, 8, 33, 256])
    bits = rng.choice([4, 8])
    arguments: dict[str, Any] = {
        "codes": torch.randint(0, 256, (block_code_bytes(count, bits, block),), dtype=torch.uint8),
        "scales": torch.rand(-(-count // block)),
        "bits": bits,
        "block": block,
    }
    if rng.random() < 0.5:
        arguments |= {"values": numbers_of(rng, count), "first_block": rng.randrange(10**6)}
        if rng.random() < 0.5:
            arguments |= {"residual": numbers_of(rng, count), "carried": rng.random() < 0.5}
        if rng.random() < 0.5:
            arguments["key"] = rng.randrange(2**63)
        function: Callable[..., Any] = quantize_blocks
    else:
        arguments |= {"out": numbers_of(rng, count), "add": rng.random() < 0.5}
        function = dequantize_blocks
    right = rng.random() < 0.4
    if not right:
        spoil(rng, arguments)
        if rng.random() < 0.2:
            arguments["block"] = rng.choice([0, -8, 10**6])
    compare(function, arguments, right)


def fuzz_signs(rng: random.Random) -> None:
    count, block = rng.choice([0, 1, 7, 256, 5000]), rng.choice([8, 64, 2048, None])
    arguments: dict[str, Any] = {
        "bits": torch.randint(0, 256, (-(-count // 8),), dtype=torch.uint8),
        "scales": torch.rand(sign_blocks(count, block)),
        "block": block,
    }
    if rng.random() < 0.5:
        arguments |= {"gradient": torch.randn(count), "residual": torch.randn(count)}
        arguments["scale"] = rng.choice(["rms", "l1"])
        function: Callable[..., Any] = pack_signs
    else:
        arguments |= {"out": torch.randn(count), "add": rng.random() < 0.5}
        function = unpack_signs
    right = rng.random() < 0.4
    if not right:
        spoil(rng, arguments)
        if rng.random() < 0.2:
            arguments["block"] = rng.choice([0, -8, 7, 8 * 10**5])
    compare(function, arguments, right, close)


ENTRIES = {
    "merge_rows": fuzz_merge_rows,
    "quantize_rows": fuzz_quantize_rows,
    "dequantize_rows": fuzz_dequantize_rows,
    "blocks": fuzz_blocks,
    "signs": fuzz_signs,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_argument_crashes_or_writes_what_it_should_not(fuzz, entry):
    fuzz(ENTRIES[entry])
