"""Which recipe each parameter and each collection of tables gets.

    Policy(
        [("tables", RowRecipe(Rows(bits=8))),
         ("*.bias", Recipe(Cast())),
         ("*", Recipe(Blocks(bits=8)))],
        warmup_steps=100,
    )

The first pattern that matches a name decides (fnmatch's rules: ``*`` stands for anything, ``?`` for
one character, ``[ab]`` for either). Names that nothing matches are an error, and so is a pattern
that matches no name: both are typing errors more often than intentions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from dqrm.comm.codecs import Codec
from dqrm.comm.dense import Algorithm
from dqrm.comm.row_codec import Rows
from dqrm.comm.rows import RowAlgorithm


class PolicyError(ValueError):
    """A policy does not fit the names it is for."""


@dataclass(frozen=True)
class Recipe:
    """How the gradient of a dense parameter is exchanged."""

    codec: Codec
    error_feedback: bool | None = None
    """Whether what the codec loses is added to the next gradient; None: unless it is linear, and
    then it cannot."""
    algorithm: Algorithm = "auto"

    def __post_init__(self) -> None:
        if self.error_feedback and self.codec.linear:
            raise ValueError(
                f"{self.codec}: is summed by all-reduce; error feedback cannot follow that"
            )

    @property
    def keeps_residual(self) -> bool:
        """Whether there is error feedback."""
        return not self.codec.linear if self.error_feedback is None else self.error_feedback


@dataclass(frozen=True)
class RowRecipe:
    """How the touched rows of a collection of tables are exchanged."""

    codec: Rows = field(default_factory=Rows)
    residual_rows: int | None = None
    """Rows whose loss is kept and added when they come again: 4 D bytes each, and again as many
    places for a rank's own share in worlds of more than four. 0 keeps none; None keeps up to
    262,144 with INT4, which loses 1/14 of a row's largest value at the most, and none otherwise."""
    algorithm: RowAlgorithm = "auto"

    def __post_init__(self) -> None:
        if self.residual_rows is not None and self.residual_rows < 0:
            raise ValueError(f"residual_rows={self.residual_rows}: must not be negative")

    @property
    def kept_rows(self) -> int:
        """How many rows' residuals are kept."""
        if self.residual_rows is not None:
            return self.residual_rows
        return 2**18 if self.codec.bits == 4 else 0


@dataclass(frozen=True)
class Policy:
    """Recipes by the patterns of names, in order.

    Args:
        recipes: pattern and recipe; a RowRecipe for collections of tables, a Recipe for parameters.
        warmup_steps: during which everything is sent in full precision.
    """

    recipes: Sequence[tuple[str, Recipe | RowRecipe]]
    warmup_steps: int = 0

    def resolve(
        self, parameters: Iterable[str], tables: Iterable[str]
    ) -> tuple[dict[str, Recipe], dict[str, RowRecipe]]:
        """Return the recipe of each parameter and of each collection of tables.

        Raises:
            PolicyError: a name has no recipe, or one of the other kind, or a pattern matches
                nothing.
        """
        used: set[int] = set()
        dense: dict[str, Recipe] = {}
        rows: dict[str, RowRecipe] = {}
        for name in parameters:
            recipe = self._first(name, used)
            if not isinstance(recipe, Recipe):
                raise PolicyError(f"parameter {name!r} is dense, but its recipe is for rows")
            dense[name] = recipe
        for name in tables:
            recipe = self._first(name, used)
            if not isinstance(recipe, RowRecipe):
                raise PolicyError(f"tables {name!r} have rows, but their recipe is for parameters")
            rows[name] = recipe
        unused = [pattern for number, (pattern, _) in enumerate(self.recipes) if number not in used]
        if unused:
            raise PolicyError(
                f"no name is left for {', '.join(map(repr, unused))}; there are "
                f"{', '.join(map(repr, [*dense, *rows])) or 'none'}"
            )
        return dense, rows

    def _first(self, name: str, used: set[int]) -> Recipe | RowRecipe:
        for number, (pattern, recipe) in enumerate(self.recipes):
            if fnmatchcase(name, pattern):
                used.add(number)
                return recipe
        patterns = ", ".join(repr(pattern) for pattern, _ in self.recipes)
        raise PolicyError(f"{name!r} matches none of {patterns or 'no patterns'}")
