"""GPTQ of one matrix: against plain rounding and against the paper's algorithm without blocks."""

import pytest
import torch

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import WeightRecord, codes, dequantize, fit
from dqrm.compress.recon.gptq import gptq, output_error


def correlated_inputs(columns, rows=400):
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing += 3 * torch.randn(columns, 1, generator=generator)
    return (torch.randn(rows, columns, generator=generator) @ mixing).double()


GRANULARITIES = [
    Granularity("row"),
    Granularity("tensor"),
    Granularity("row_groups", 4),
    Granularity("k_groups", 32),
    Granularity("k_groups", 48),
]


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_gptq_beats_rounding_and_stays_on_the_grid(granularity, act_order):
    # More than one block of columns; groups that do and do not divide blocks and the matrix.
    inputs = correlated_inputs(200)
    gram = inputs.T @ inputs
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(3))
    rounded, scale = gptq(weight, gram, 4, granularity, act_order=act_order)
    record = WeightRecord("symmetric", 4, granularity, scale)
    assert torch.equal(rounded, dequantize(codes(rounded, record), record))
    plain_codes, plain_scale = fit(weight, "symmetric", 4, granularity)
    plain = dequantize(plain_codes, WeightRecord("symmetric", 4, granularity, plain_scale))
    assert output_error(weight, rounded, gram) < 0.5 * output_error(weight, plain, gram)


def test_gptq_of_inputs_that_do_not_correlate_is_rounding():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    granularity = Granularity("row")
    rounded, scale = gptq(weight, torch.eye(40).double(), 3, granularity)
    plain_codes, plain_scale = fit(weight, "symmetric", 3, granularity)
    record = WeightRecord("symmetric", 3, granularity, plain_scale)
    assert torch.equal(scale, plain_scale)
    assert torch.equal(rounded, dequantize(plain_codes, record))
    # Inputs that never were anything but zero are rounded as well.
    dead, _ = gptq(weight, torch.zeros(40, 40).double(), 3, granularity)
    assert torch.equal(dead, rounded)


def test_gptq_of_too_few_samples_asks_for_damping():
    inputs = torch.ones(4, 64, dtype=torch.float64)
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))
    row = Granularity("row")
    with pytest.raises(ValueError, match="raise damping, or look at more samples"):
        gptq(weight, inputs.T @ inputs, 4, row, damping=1e-30)
    assert gptq(weight, inputs.T @ inputs, 4, row, damping=0.01)[0].isfinite().all()


@pytest.mark.parametrize("granularity", [Granularity("row"), Granularity("k_groups", 8)], ids=str)
def test_gptq_takes_the_scale_of_a_full_range(granularity):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    gram = torch.eye(40).double()
    rounded, scale = gptq(weight, gram, 3, granularity, full_range=True)
    plain_codes, plain_scale = fit(weight, "symmetric", 3, granularity, full_range=True)
    assert torch.equal(scale, plain_scale)
    record = WeightRecord("symmetric", 3, granularity, plain_scale)
    assert torch.equal(rounded, dequantize(plain_codes, record))


def reference_gptq(weight, gram, bits, damping):
    """The algorithm of the paper without blocks: one column at a time, H^-1 updated in full."""
    left = weight.double().clone()
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double()
    inverse = torch.linalg.inv(hessian)
    _, scale = fit(weight, "symmetric", bits, Granularity("row"))
    step, largest = scale.double()[:, 0], 2 ** (bits - 1) - 1
    out = torch.zeros_like(left)
    for column in range(left.shape[1]):
        value = left[:, column]
        out[:, column] = torch.clamp((value / step).round(), -largest - 1, largest) * step
        error = (value - out[:, column]) / inverse[column, column]
        left -= torch.outer(error, inverse[column])
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / (inverse[column, column])
        )
    return out.float()


def test_gptq_equals_the_algorithm_without_blocks():
    inputs = correlated_inputs(150)
    gram = inputs.T @ inputs
    weight = torch.randn(6, 150, generator=torch.Generator().manual_seed(5))
    rounded, _ = gptq(weight, gram, 4, Granularity("row"), damping=0.01)
    torch.testing.assert_close(rounded, reference_gptq(weight, gram, 4, 0.01))


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("granularity", [Granularity("row"), Granularity("k_groups", 48)], ids=str)
def test_gptq_leaves_what_a_pattern_cut_at_zero(granularity, act_order):
    inputs = correlated_inputs(200)
    gram, pattern = inputs.T @ inputs, NM(2, 4)
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(3))
    kept = pattern.mask(weight)
    weight *= kept
    rounded, scale = gptq(weight, gram, 4, granularity, kept, act_order=act_order)
    record = WeightRecord("symmetric", 4, granularity, scale)
    assert torch.equal(rounded, dequantize(codes(rounded, record), record))
    assert not rounded[~kept].any()
    plain_codes, plain_scale = fit(weight, "symmetric", 4, granularity)
    plain = dequantize(plain_codes, WeightRecord("symmetric", 4, granularity, plain_scale))
    cut = gptq(weight, gram, 4, granularity, act_order=act_order)[0] * kept
    error = output_error(weight, rounded, gram)
    assert error < 0.7 * output_error(weight, plain, gram)
    assert error < output_error(weight, cut, gram)
