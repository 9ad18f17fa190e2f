"""Policies: the first pattern decides, and nothing is left over."""

import pytest

from dqrm.comm import Blocks, Cast, Policy, PolicyError, Recipe, RowRecipe, Rows, row_codec_named

NAMES = ["bottom.0.weight", "bottom.0.bias", "top.0.weight", "top.0.bias"]


def test_the_first_pattern_that_matches_decides() -> None:
    policy = Policy([("tables*", RowRecipe()), ("*.bias", Recipe(Cast())), ("*", Recipe(Blocks()))])
    dense, rows = policy.resolve(NAMES, ["tables"])
    assert [dense[name].codec for name in NAMES] == [Blocks(), Cast(), Blocks(), Cast()]
    assert rows == {"tables": RowRecipe()}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([("*.bias", Recipe(Cast()))], "'bottom.0.weight' matches none of '\\*.bias'"),
        ([], "'bottom.0.weight' matches none of no patterns"),
        (
            [("*", Recipe(Cast())), ("*.bias", Recipe(Cast()))],
            "no name is left for '\\*.bias'; there are 'bottom.0.weight'",
        ),
        ([("*", RowRecipe())], "'bottom.0.weight' is dense, but its recipe is for rows"),
    ],
)
def test_names_and_patterns_left_over_are_errors(patterns: list, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy(patterns).resolve(NAMES, [])


def test_tables_need_a_recipe_for_rows() -> None:
    with pytest.raises(PolicyError, match="'tables' have rows"):
        Policy([("*", Recipe(Cast()))]).resolve([], ["tables"])


def test_feedback_follows_the_codec_unless_asked() -> None:
    assert Recipe(Blocks()).keeps_residual
    assert not Recipe(Blocks(), error_feedback=False).keeps_residual
    assert not Recipe(Cast()).keeps_residual
    with pytest.raises(ValueError, match="error feedback cannot follow"):
        Recipe(Cast(), error_feedback=True)
    assert RowRecipe(Rows(8)).kept_rows == 0
    assert RowRecipe(Rows(4)).kept_rows == 2**18
    assert RowRecipe(Rows(4), residual_rows=0).kept_rows == 0
    with pytest.raises(ValueError, match="must not be negative"):
        RowRecipe(residual_rows=-1)


def test_row_codecs_by_name() -> None:
    assert row_codec_named("int4") == Rows(4)
    with pytest.raises(ValueError, match="must be one of fp32, bf16, int8, int4"):
        row_codec_named("int5")
    with pytest.raises(ValueError, match="bits must be"):
        Rows(5)  # type: ignore[arg-type]
