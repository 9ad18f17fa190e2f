"""``dqrm train``: resolve the configuration, train, print what came of it."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dqrm.cli import dlrm_flags
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.summary import summary
from dqrm.cli.workers import nproc_option, workers_to_start

if TYPE_CHECKING:
    from dqrm.config import RunConfig

log = logging.getLogger(__name__)

_EXAMPLES = [
    ("dqrm train --config census", "4 bits on the built-in example"),
    ("dqrm train --config census quant.bits=32 --run-name fp32", "the same in full precision"),
    ("dqrm train --config census --dry-run", "sizes, memory and time, without training"),
    ("dqrm train data.path=prepared/clicks optim.lr=0.05 train.epochs=2", "your own data"),
    ("dqrm train --config census --nproc 2", "two processes that exchange INT8 gradients"),
    ("dqrm train --config census --resume auto", "go on with the newest unfinished run"),
]


def _print_dlrm_help(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        click.echo(dlrm_flags.help_text())
        ctx.exit()


@click.command("train", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@click.option("--run-name", "-n", metavar="NAME", help="Name of the run and its folder (name).")
@click.option(
    "--resume",
    metavar="auto|PATH",
    help="Go on with a run's folder or a checkpoint; auto: with the newest unfinished run of "
    "this configuration, or a new one.",
)
@click.option("--experiment", metavar="NAME", help="MLflow experiment (tracking.experiment).")
@click.option("--tracking-uri", metavar="URI", help="MLflow store or server (tracking.uri).")
@click.option("--no-track", is_flag=True, help="Do not record the run in MLflow.")
@nproc_option()
@click.option(
    "--backend",
    type=click.Choice(["auto", "ccl", "gloo", "ccl-intel"]),
    help="What gradients travel over between processes (exchange.backend).",
)
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@click.option("--dry-run", is_flag=True, help="Print sizes, memory, steps and time and stop.")
@click.option(
    "--help-dlrm",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_dlrm_help,
    help="List the flags of facebookresearch/dlrm that are taken.",
)
@dlrm_flags.dlrm_options
@overrides_argument()
@click.pass_context
def train(
    ctx: click.Context,
    source: str | None,
    run_name: str | None,
    resume: str | None,
    experiment: str | None,
    tracking_uri: str | None,
    no_track: bool,
    nproc: int | None,
    backend: str | None,
    print_config: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
) -> int:
    """Train a model and record the run.

    Values come from the defaults, then --config, then KEY=VALUE overrides; `dqrm config
    --fields` lists the keys. SIGINT and SIGTERM save a checkpoint before the run ends.
    """
    from dqrm.configuration import to_yaml
    from dqrm.yaml_text import dump_value

    given = dlrm_flags.given_flags(ctx)
    for flag, key, value in (
        ("--run-name", "name", run_name),
        ("--experiment", "tracking.experiment", experiment),
        ("--tracking-uri", "tracking.uri", tracking_uri),
        ("--no-track", "tracking.enabled", False if no_track else None),
        ("--backend", "exchange.backend", backend),
    ):
        if value is not None:
            given.set(flag, key, dump_value(value))
    config = _resolve(source, resume, dlrm_flags.merge(given, overrides))
    if print_config:
        click.echo(to_yaml(config), nl=False)
        return 0

    from dqrm.launch import find_place, start_workers

    place = find_place()
    workers = workers_to_start(nproc)
    if workers is not None and not dry_run:
        return start_workers(workers, sys.argv[1:])

    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    prepare_threads(config.train.threads)
    dlrm_flags.check(given, config)
    if given.without_effect:
        log.info("without effect, as it is always so: %s", " ".join(given.without_effect))
    if dry_run:
        from dqrm.cli.dry_run import describe

        click.echo(describe(config, nproc or place.world_size))
        return 0

    from dqrm.training.run import train as run

    recipe = Path(source).stem if source else None
    result = run(config, resume=_resume_point(resume), recipe=recipe)
    if place.rank == 0:
        click.echo(summary(result, config))
    return 0 if result.interrupted is None else 128 + result.interrupted


def _resolve(source: str | None, resume: str | None, overrides: list[str]) -> "RunConfig":
    from dqrm.config import RunConfig
    from dqrm.configuration import load

    if source is None and resume not in (None, "auto"):
        # A run knows its configuration: `--resume PATH` needs no other.
        path = Path(str(resume))
        stored = [folder / "config.yaml" for folder in (path, *path.parents[:2])]
        return load(RunConfig, next((s for s in stored if s.is_file()), None), overrides)
    return load(RunConfig, source, overrides)


def _resume_point(resume: str | None) -> Path | Literal["auto"] | None:
    if resume is None or resume == "auto":
        return "auto" if resume else None
    path = Path(resume)
    if not path.is_dir():
        raise click.UsageError(f"--resume {resume}: no such folder; give a run or a checkpoint")
    return path
