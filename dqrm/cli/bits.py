"""``dqrm bits``: which bits each embedding table gets under a budget."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.text import bytes_text, pairs, table

if TYPE_CHECKING:
    from dqrm.compress.config import Bits, TableGranularity
    from dqrm.training.table_bits import TableBits

_EXAMPLES = [
    ("dqrm bits runs/fp32 --ratio 12", "tables 12 times smaller than in FP32"),
    ("dqrm bits runs/fp32 --like 4", "no larger than with 4 bits in all of them"),
    ("dqrm bits runs/fp32 --ratio 12 --options 16,8,4 --json", "other bits; all that was found"),
]


class _BitsList(click.ParamType[tuple[int, ...], str]):
    """Numbers of bits with commas between."""

    name = "BITS,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Refuse what no table can have, and fewer than two."""
        from dqrm.compress.config import Bits

        known = [str(bits) for bits in get_args(Bits)]
        parts = [part.strip() for part in str(value).split(",")]
        for part in parts:
            if part not in known:
                self.fail(f"{part!r}: tables have {', '.join(known)} bits", param, ctx)
        if len(set(parts)) < max(2, len(parts)):
            self.fail("name two or more, and each once", param, ctx)
        return tuple(int(part) for part in parts)


@click.command("bits", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN|CHECKPOINT")
@click.option(
    "--ratio",
    type=click.FloatRange(min=1, min_open=True),
    metavar="X",
    help="Times that the tables together shall be smaller than in FP32, at least.",
)
@click.option(
    "--like", type=int, metavar="BITS", help="Take no more bytes than with these bits in all."
)
@click.option(
    "--options",
    type=_BitsList(),
    default="8,4,2",
    show_default=True,
    help="Bits that a table may get.",
)
@click.option(
    "--granularity",
    type=click.Choice(["table", "row"]),
    default="table",
    show_default=True,
    help="Scales of the tables to come, as quant.granularity says when they are trained.",
)
@click.option("--data", metavar="PATH", help="Prepared data set; by default the run's own.")
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Batches of training rows, of the run's size, that gradients are taken of.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all that was found, as JSON.")
def bits(
    model: Path,
    ratio: float | None,
    like: int | None,
    options: "tuple[Bits, ...]",
    granularity: "TableGranularity",
    data: str | None,
    batches: int,
    as_json: bool,
) -> None:
    """Choose the bits of each embedding table under a budget of bytes.

    What fewer bits cost a table is foreseen by a trained model: its rounding errors, weighted by
    the squared gradients of the rows that training looks up (the Fisher information). Best is a
    run in FP32 (quant.bits=32). Small tables usually get more bits, and large ones whose rows are
    seldom looked up fewer.

    The last line, alone on standard output, is the argument that trains with these bits:
    dqrm train --config synth "$(dqrm bits runs/fp32 --ratio 12)"
    """
    if not model.exists():
        raise click.UsageError(f"{model}: no such run or checkpoint")
    if (ratio is None) == (like is None):
        raise click.UsageError("set --ratio or --like, one of them: there is no budget without")
    if like is not None and like not in options:
        told = ", ".join(map(str, options))
        raise click.UsageError(f"--like {like}: name one of the --options, {told}")

    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    prepare_threads()

    from dqrm.cli.progress import ProgressDisplay
    from dqrm.compress.signals.budget import Budget
    from dqrm.training.table_bits import table_bits_of

    budget = Budget(ratio, None if like is None else options.index(like))
    with ProgressDisplay() as display:
        found = table_bits_of(
            model,
            budget,
            options,
            granularity,
            data=data,
            batches=batches,
            progress=lambda done, total: display.show("gradients", done, total, "batches"),
        )
    if as_json:
        click.echo(json.dumps(found.as_tree(), indent=2))
        return
    click.echo(_text(found), err=True)
    click.echo(f"quant.table_bits={json.dumps(found.bits)}")


def _text(found: "TableBits") -> str:
    """Tables with their bits, and what they come to."""
    spent = found.allocated
    shown = [
        (
            name,
            f"{rows:,}",
            str(found.bits[name]),
            *(f"{candidate.loss:.1e}" for candidate in spent.candidates[name]),
        )
        for name, rows in found.rows.items()
    ]
    header = ("table", "rows", "bits", *(f"loss at {bits}" for bits in found.options))
    total = spent.total(spent.chosen)
    lines = [
        (
            "tables",
            f"{bytes_text(total.cost)}, {spent.fp32_bytes / total.cost:.1f} times smaller than in "
            f"FP32; expected to add {total.loss:.1e} to the loss",
        ),
        ("scales", f"one a {found.granularity} (--granularity)"),
    ]
    for place, bits in enumerate(found.options):
        uniform = spent.uniform(place)
        lines.append((f"{bits} in all", f"{bytes_text(uniform.cost)}; {uniform.loss:.1e}"))
    return f"{table(header, shown)}\n\n{pairs(lines)}\n"
