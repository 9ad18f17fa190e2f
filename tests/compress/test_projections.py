"""Projections to low-bit grids and N:M patterns against exhaustive search."""

import itertools
import math

import pytest
import torch

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.joint import project_joint
from dqrm.compress.grids.lowbit import binarize, ternarize
from dqrm.compress.grids.nm import NM, _compared, _sorted, project
from dqrm.compress.grids.record import WeightRecord, codes, dequantize, fit
from dqrm.compress.grids.rounding import round_codes

PATTERNS = [NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 5), NM(4, 8)]
ROW = Granularity("row")


def error(weight, value):
    return (weight.double() - value.double()).square().sum(dim=-1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_support_is_nearer_than_the_projection(pattern):
    groups = torch.randn(20_000, pattern.group, generator=torch.Generator().manual_seed(0))
    kept = pattern.mask(groups)
    assert (kept.sum(dim=1) == pattern.keep).all()
    supports = torch.zeros(math.comb(pattern.group, pattern.keep), pattern.group)
    for row, places in enumerate(itertools.combinations(range(pattern.group), pattern.keep)):
        supports[row, list(places)] = 1
    best = (groups.double().square() @ (1 - supports).double().T).amin(dim=1)
    torch.testing.assert_close(error(groups, project(groups, pattern)), best, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("values", [2, 3], ids=["mostly-ties", "some-ties"])
def test_of_equal_magnitudes_the_first_stay(pattern, values):
    generator = torch.Generator().manual_seed(1)
    groups = torch.randint(-values + 1, values, (500, pattern.group), generator=generator).float()
    for group, kept in zip(groups.tolist(), pattern.mask(groups).tolist(), strict=True):
        order = sorted(range(pattern.group), key=lambda place: (-abs(group[place]), place))
        assert [place for place, stays in enumerate(kept) if stays] == sorted(order[: pattern.keep])


@pytest.mark.parametrize("group", [4, 16, 32])
def test_ranking_by_pairs_and_by_sorting_agree(group):
    pattern = NM(3, group)
    view = torch.randint(0, 4, (300, 1, group), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(_compared(view, 3), _sorted(view, pattern))


def test_a_group_that_is_not_full_counts_as_filled_up_with_zeros():
    kept = NM(2, 4).mask(torch.tensor([[1.0, 2, 3, 4, 0, 0, 7], [4, 3, 2, 1, 0, 0, 0]]))
    assert kept.int().tolist() == [[0, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0]]
    assert NM(3, 4).mask(torch.zeros(1, 2)).all()
    assert NM(2, 4).mask(torch.randn(3, 2, 7)).sum() == 3 * (3 * 2 + 2)


@pytest.mark.parametrize(
    "values",
    [
        [math.nan] * 4,
        [math.inf, -math.inf, math.inf, 0],
        [1e-45, -1e-45, 1e-45, 0],
        [3e38, -3e38, 1e38, math.nan],
        [-0.0, 0.0, -0.0, 0.0],
    ],
    ids=["nan", "infinite", "denormal", "huge-and-nan", "zeros-of-both-signs"],
)
def test_hostile_groups_keep_exactly_two(values):
    kept = NM(2, 4).mask(torch.tensor([values]))[0]
    assert kept.sum() == 2
    assert not math.isnan(values[3]) or kept[3] or all(map(math.isnan, values))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1)], ids=["no-rows", "no-columns", "one"])
def test_small_weights_have_masks_of_their_shape(shape):
    assert NM(2, 4).mask(torch.ones(shape)).shape == shape
    assert NM(2, 4).holds(torch.ones(shape))


@pytest.mark.parametrize("wrong", [(0, 4), (4, 4), (5, 4), (-1, 4)])
def test_impossible_patterns_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 1 <= keep < group"):
        NM(*wrong)


def test_binary_scales_are_least_squares():
    view = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    found, scale = binarize(view)
    assert set(found.unique().tolist()) == {-1, 1}
    signs = view.sign().double()
    best = (view.double() * signs).sum(dim=1) / signs.square().sum(dim=1)
    torch.testing.assert_close(scale[:, 0].double(), best, rtol=1e-6, atol=0)


def best_ternary(row):
    """The least squared error of any ternary values: some of the largest, at their mean."""
    magnitude = row.abs().sort(descending=True).values.double()
    kept = torch.arange(1, len(row) + 1)
    return magnitude.square().sum() - (magnitude.cumsum(0).square() / kept).max()


@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_ternary_is_near_the_exact_optimum(draw):
    view = draw(200, 500, generator=torch.Generator().manual_seed(4)) - (draw is torch.rand) * 0.5
    found, scale = ternarize(view)
    ours = error(view, scale * found).sum()
    best = sum(best_ternary(row) for row in view)
    assert best <= ours <= best * 1.01
    assert set(found.unique().tolist()) == {-1, 0, 1}
    kept = found != 0
    mean = (view.abs() * kept).sum(dim=1) / kept.sum(dim=1)
    torch.testing.assert_close(scale[:, 0], mean)


def test_ternary_and_binary_by_hand():
    view = torch.tensor([[4.0, -2.0, 0.0, 0.5, -0.0], [0, 0, 0, 0, 0]])
    found, scale = ternarize(view)
    # 0.7 of the mean 1.3 is 0.91.
    assert found.tolist() == [[1, -1, 0, 0, 0], [0] * 5]
    assert scale.flatten().tolist() == pytest.approx([3.0, 1e-8])
    found, scale = binarize(view)
    assert found.tolist() == [[1, -1, 1, 1, 1], [1] * 5]
    assert scale.flatten().tolist() == pytest.approx([1.3, 1e-8])


@pytest.mark.parametrize("grid", [ternarize, binarize])
def test_what_is_not_kept_counts_for_nothing(grid):
    view = torch.randn(7, 12, generator=torch.Generator().manual_seed(5))
    kept = torch.rand(7, 12, generator=torch.Generator().manual_seed(6)) < 0.5
    kept[3] = False
    found, scale = grid(view, kept)
    assert not found[~kept].any()
    for row in range(7):
        alone, wanted = grid(view[row, kept[row]][None])
        assert torch.equal(found[row, kept[row]], alone[0])
        torch.testing.assert_close(scale[row], wanted[0])


GRIDS = [("symmetric", 2), ("symmetric", 4), ("symmetric", 8), ("ternary", 2), ("binary", 1)]
VIEWS = [Granularity("tensor"), ROW, Granularity("row_groups", 3), Granularity("k_groups", 4)]


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
@pytest.mark.parametrize("granularity", VIEWS, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 10])
def test_codes_are_found_again_from_values(grid, bits, granularity, columns):
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    weight[0, 0], weight[1] = 1e-42, 0.0
    found, scale = fit(weight, grid, bits, granularity)
    record = WeightRecord(grid, bits, granularity, scale)
    value = dequantize(found, record)
    assert scale.shape == granularity.scale_shape(weight.shape)
    assert torch.equal(codes(value, record), found)
    again, same = fit(value, "symmetric", 8, granularity)
    assert torch.isfinite(again * 1.0).all()
    assert same.shape == scale.shape


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
@pytest.mark.parametrize("granularity", VIEWS[1:], ids=str)
def test_each_group_is_quantized_by_itself(grid, bits, granularity):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(7))
    found, scale = fit(weight, grid, bits, granularity)
    value = dequantize(found, WeightRecord(grid, bits, granularity, scale))
    pieces = {
        "row": lambda matrix: list(matrix),
        "row_groups": lambda matrix: list(matrix.reshape(3, -1)),
        "k_groups": lambda matrix: [part for row in matrix for part in row.split(4)],
    }[granularity.kind]
    for piece, wanted in zip(pieces(weight), pieces(value), strict=True):
        own, its = fit(piece[None], grid, bits, ROW)
        torch.testing.assert_close(wanted, (its * own)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hostile", [math.nan, math.inf], ids=["nan", "infinite"])
@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_what_is_not_finite_shows_in_its_group_alone(hostile, grid, bits):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(8))
    weight[1, 2] = hostile
    found, scale = fit(weight, grid, bits, ROW)
    value = dequantize(found, WeightRecord(grid, bits, ROW, scale))
    assert value[1].isnan().any()
    assert torch.isfinite(value[[0, 2]]).all()


@pytest.mark.parametrize("size", [3e38, 1e-40], ids=["huge", "denormal"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_extreme_weights_have_codes(size, bits):
    found, scale = fit(torch.tensor([[size, -size, 0.0]]), "symmetric", bits, ROW)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(found).all()


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 x 5 cannot be cut into 4 groups"):
        Granularity("row_groups", 4).view(torch.ones(3, 5))
    for kind, size in [("row", 2), ("k_groups", 0), ("row_groups", -1), ("column", 0)]:
        with pytest.raises(ValueError, match="granularity"):
            Granularity(kind, size)


def test_a_view_is_undone():
    weight = torch.randn(5, 2, 3)
    for granularity in [*VIEWS[:2], Granularity("row_groups", 10), Granularity("k_groups", 4)]:
        assert torch.equal(granularity.restore(granularity.view(weight), weight.shape), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_joint_projection_is_near_the_exhaustive_one(bits):
    pattern, largest = NM(2, 4), 2 ** (bits - 1) - 1
    weight = torch.randn(40, 4, generator=torch.Generator().manual_seed(9))
    ours = error(weight, project_joint(weight, pattern, bits, ROW, "symmetric"))
    plain = project(weight, pattern)
    simple, scale = fit(plain, "symmetric", bits, ROW)
    # Every support, every code of each of its weights, the scale that is best for them.
    combinations = torch.tensor(
        [
            placed
            for places in itertools.combinations(range(4), 2)
            for values in itertools.product(range(-largest, largest + 1), repeat=2)
            for placed in [[dict(zip(places, values, strict=True)).get(i, 0) for i in range(4)]]
        ],
        dtype=torch.float64,
    )
    combinations = combinations[combinations.any(dim=1)]
    product = weight.double() @ combinations.T
    gain = product.square() / combinations.square().sum(dim=1)
    best = weight.double().square().sum(dim=1) - gain.amax(dim=1)
    assert (ours >= best - 1e-6).all()
    assert (ours <= error(weight, scale * simple) + 1e-6).all()
    # Codes and scale that fit each other need not be the best pair: of few codes it shows most.
    assert ours.mean() <= best.mean() * 1.05
    assert pattern.holds(project_joint(weight, pattern, bits, ROW, "symmetric"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_magnitudes_are_the_order_to_keep_by_at_any_scale(bits):
    largest = 2 ** (bits - 1) - 1
    magnitudes = torch.linspace(0, 3, 301, dtype=torch.float64)
    for scale in (0.05, 0.3, 1.0, 5.0):
        value = scale * (magnitudes / scale).round().clamp(max=largest)
        gain = magnitudes.square() - (magnitudes - value).square()
        assert (gain.diff() >= -1e-12).all()


def test_stochastic_rounding_is_right_on_average_and_whole():
    torch.manual_seed(0)
    values = torch.tensor([0.25, -0.25, 2.0, -1.9, 0.0]).repeat(20_000, 1)
    rounded = round_codes(values.clone(), "stochastic")
    assert torch.equal(rounded, rounded.round())
    assert ((rounded - values).abs() < 1).all()
    # The standard error of a mean of 20,000 with deviation up to 0.5 is 0.0036.
    torch.testing.assert_close(rounded.mean(0), values[0], rtol=0, atol=0.018)
