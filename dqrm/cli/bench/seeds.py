"""The option of studies that are repeated with several seeds."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def seeds_option() -> Callable[[Function], Function]:
    """Return a decorator that adds ``--seeds``, different whole numbers by commas."""
    return click.option(
        "--seeds", default="0,1,2", show_default=True, callback=_seeds, help="Seeds, by commas."
    )


def _seeds(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give whole numbers, for example 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise click.BadParameter(f"{text!r}: give different seeds; the same one is no repetition")
    return seeds
