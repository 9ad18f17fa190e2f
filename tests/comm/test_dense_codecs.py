"""Codecs of dense gradients, in one process: what arrives, what is kept, and what is refused."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqrm.comm import Blocks, Cast, Codec, Largest, Signs, codec_named
from dqrm.kernels.rounding import step_key

CODECS = [
    Cast(),
    Cast(torch.bfloat16),
    Cast(torch.float16),
    Blocks(8),
    Blocks(4, block=64),
    Blocks(8, rounding="stochastic"),
    Signs(),
    Signs(block=64, scale="l1"),
    Largest(0.05),
    Largest(0.3, bits=32),
]
COUNTS = [0, 1, 7, 8, 63, 64, 65, 4097]


def room(codec: Codec, count: int) -> Tensor:
    return torch.full((codec.wire_bytes(count) + 5,), 0xA5, dtype=torch.uint8)


def arrived(codec: Codec, values: Tensor, residual: Tensor | None = None, step: int = 0) -> Tensor:
    payload = room(codec, values.numel())
    size = codec.encode(values, payload, residual, key=step_key(1, step))
    assert size is not None
    out = torch.full_like(values, math.nan)
    assert codec.decode(payload, out) == size
    return out


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sent_and_residual_add_up_to_what_was_given(codec: Codec, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values, residual = (torch.randn(count, generator=generator) for _ in range(2))
    given_values, owed = values.clone(), values + residual
    payload = room(codec, count)
    size = codec.encode(values, payload, residual, key=step_key(1, 2))
    assert size is not None
    assert size <= codec.wire_bytes(count)
    assert size == codec.wire_bytes(count) or not codec.exact
    assert (payload[codec.wire_bytes(count) :] == 0xA5).all()
    out = torch.empty(count)
    assert codec.decode(payload[:size], out) == size
    assert torch.equal(values, given_values)
    torch.testing.assert_close(out + residual, owed, rtol=1e-6, atol=1e-6)
    added = torch.ones(count)
    codec.decode(payload[:size], added, add=True, alpha=-0.5)
    torch.testing.assert_close(added, 1 - 0.5 * out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_reported(codec: Codec, wrong: float) -> None:
    for count, at in ((1, 0), (5000, 4321), (100, 37)):
        values = torch.randn(count)
        values[at] = wrong
        assert codec.encode(values, room(codec, count), torch.zeros(count)) is None
        assert codec.encode(values, room(codec, count)) is None


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_payloads_that_are_cut_off_are_refused(codec: Codec) -> None:
    values = torch.randn(500)
    payload = room(codec, 500)
    size = codec.encode(values, payload)
    assert size is not None
    for length in {0, 1, 7, size // 2, size - 1}:
        with pytest.raises(ValueError, match=r"cut off|cannot be|does not hold"):
            codec.decode(payload[:length].clone(), torch.empty(500))


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.align > 1], ids=str)
def test_splitting_at_blocks_changes_nothing(codec: Codec) -> None:
    values = torch.randn(3 * codec.align + 5)
    whole = arrived(codec, values)
    key = step_key(1, 0)
    for cut in (codec.align, 2 * codec.align):
        parts = []
        for begin, end in ((0, cut), (cut, len(values))):
            payload = room(codec, end - begin)
            assert codec.encode(values[begin:end].clone(), payload, key=key, first=begin)
            part = torch.empty(end - begin)
            codec.decode(payload, part)
            parts.append(part)
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if not codec.linear], ids=str)
def test_zeros_of_both_signs_and_extremes_arrive(codec: Codec) -> None:
    zeros = torch.zeros(100)
    zeros[::3] = -0.0
    out = arrived(codec, zeros)
    assert torch.equal(out, torch.zeros(100))
    assert not out.view(torch.int32).any() or isinstance(codec, Signs)
    for value in (1e-45, 1e-38, 1e30):
        assert arrived(codec, torch.full((100,), value)).isfinite().all()


def test_stochastic_rounding_is_right_on_average() -> None:
    codec = Blocks(4, block=64, rounding="stochastic")
    values = torch.randn(640, generator=torch.Generator().manual_seed(5))
    draws = 2000
    mean = torch.stack([arrived(codec, values, step=step) for step in range(draws)]).mean(0)
    scales = (values.view(10, 64).abs().amax(1) / 7).repeat_interleave(64)
    # A draw's standard deviation is half a step at the most.
    assert ((mean - values).abs() <= 5 * 0.5 * scales / math.sqrt(draws)).all()


def streams(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    persistent = torch.randn(count, generator=generator)
    layers = 10.0 ** torch.linspace(-3, 1, 16).repeat_interleave(count // 16)
    mostly_zero = persistent * (torch.rand(count, generator=generator) < 0.1)
    return {"persistent": persistent, "mixed": persistent * layers, "mostly zero": mostly_zero}


@pytest.mark.parametrize("kind", ["persistent", "mixed", "mostly zero"])
@pytest.mark.parametrize(
    ("codec", "bound"),
    [(Blocks(8), 0.1), (Blocks(4, block=64), 0.5), (Signs(block=256), 20.0), (Largest(0.1), 20.0)],
    ids=str,
)
def test_residuals_stay_bounded_in_the_loop(codec: Codec, bound: float, kind: str) -> None:
    direction = streams(4096)[kind]
    generator = torch.Generator().manual_seed(1)
    residual, total, sent = (torch.zeros(4096) for _ in range(3))
    for _ in range(400):
        gradient = direction * (1 + 0.3 * torch.randn(4096, generator=generator))
        total += gradient
        sent += arrived(codec, gradient, residual)
    assert residual.norm() <= bound * direction.norm()
    torch.testing.assert_close(sent + residual, total, rtol=1e-3, atol=1e-3 * float(total.norm()))


def test_without_feedback_small_values_never_arrive() -> None:
    values = torch.full((64,), 0.04)
    values[0] = 1.0
    codec = Blocks(4, block=64)
    lost = sum(arrived(codec, values)[1:].abs().sum() for _ in range(20))
    assert lost == 0
    residual = torch.zeros(64)
    sent = torch.stack([arrived(codec, values, residual) for _ in range(200)]).mean(0)
    torch.testing.assert_close(sent, values, rtol=0.05, atol=0.001)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    codec=st.sampled_from(CODECS),
    count=st.integers(0, 600),
)
def test_damaged_payloads_are_refused_or_give_some_values(
    data: st.DataObject, codec: Codec, count: int
) -> None:
    payload = room(codec, count)
    size = codec.encode(torch.randn(count), payload)
    assert size is not None
    damaged = payload[: data.draw(st.integers(0, size))].clone()
    for _ in range(data.draw(st.integers(0, 6))):
        if len(damaged):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    out = torch.zeros(count)
    with contextlib.suppress(ValueError):
        assert 0 <= codec.decode(damaged, out) <= len(damaged)


def test_top_values_are_the_largest_and_about_as_many_as_asked() -> None:
    codec = Largest(0.01)
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    found = arrived(codec, values).nonzero().view(-1)
    assert 1400 <= len(found) <= 2400
    rest = values.clone()
    rest[found] = 0
    assert rest.abs().max() <= values[found].abs().min() + 1e-6
    constant = arrived(codec, torch.ones(50_000))
    assert constant.count_nonzero() == 600


@pytest.mark.parametrize(
    ("text", "codec"),
    [("fp32", Cast()), ("int4", Blocks(4, block=64)), ("sign", Signs()), ("top:0.2", Largest(0.2))],
)
def test_names(text: str, codec: Codec) -> None:
    assert codec_named(text) == codec


@pytest.mark.parametrize("text", ["int9", "top:", "top:7", ""])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="codec"):
        codec_named(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Blocks(5),  # type: ignore[arg-type]
        lambda: Blocks(8, block=3),
        lambda: Signs(block=12),
        lambda: Largest(0.0),
        lambda: Cast(torch.int8),
    ],
)
def test_impossible_codecs_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]
