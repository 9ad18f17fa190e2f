"""The outermost command. Only names and one-line descriptions are loaded here."""

from typing import NoReturn

import click

from dqrm import __version__
from dqrm.cli.framework import RootGroup

_COMMANDS = {
    "data": ("dqrm.cli.data:data", "Prepare, describe, apply and generate data sets."),
    "train": ("dqrm.cli.train:train", "Train a model and record the run."),
    "sweep": ("dqrm.cli.sweep:sweep", "Search for configuration values."),
    "eval": ("dqrm.cli.eval:evaluate", "Measure a trained model on a prepared data set."),
    "bits": (
        "dqrm.cli.bits:bits",
        "Choose the bits of each embedding table under a budget of bytes.",
    ),
    "compare": (
        "dqrm.cli.compare:compare",
        "Show runs side by side: metrics, settings that differ, pictures.",
    ),
    "profile": (
        "dqrm.cli.profile:profile",
        "Show a model's parameters, FLOPs and time, module by module.",
    ),
    "pipeline": (
        "dqrm.cli.pipeline:pipeline",
        "Run files of stages: train, fine-tune, report.",
    ),
    "champion": (
        "dqrm.cli.champion:champion",
        "Show which version of a model serves, and roll back to another.",
    ),
    "jobs": ("dqrm.cli.jobs:jobs", "Run pipelines and commands on a schedule."),
    "config": ("dqrm.cli.config:config", "Print the resolved configuration."),
    "configs": ("dqrm.cli.configs:configs", "List and copy the shipped configurations."),
    "bench": (
        "dqrm.cli.bench:bench",
        "Measure accuracy and speed, with seeds, versions and settings on record.",
    ),
    "study": (
        "dqrm.cli.study:study",
        "Repeat a claim: arms beside the strongest rival, over seeds, with a verdict by a rule.",
    ),
    "ui": ("dqrm.cli.ui:ui", "Open the MLflow page on the store that runs are recorded in."),
    "tracking": ("dqrm.cli.tracking:tracking", "Upload what a lost tracking server missed."),
    "doctor": ("dqrm.cli.doctor:doctor", "Show what this machine offers and what will be used."),
    "completion": ("dqrm.cli.completion:completion", "Print the completion script of a shell."),
}

_EXAMPLES = [
    ("dqrm train --config census", "train at 4 bits on the built-in example"),
    ("dqrm ui", "look at the runs"),
    ("dqrm train --help", "see what a command can do; every command has examples"),
]


@click.group(
    "dqrm",
    cls=RootGroup,
    lazy=_COMMANDS,
    examples=_EXAMPLES,
    help="Train recommenders on CPUs at 4 bits.\n\n"
    "Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 quality gate not met, "
    "130 or 143 interrupted (training has saved a checkpoint).",
)
@click.version_option(__version__, "-V", "--version", prog_name="dqrm")
def cli() -> None:
    """Hold the commands."""


def main() -> NoReturn:
    """Run the command line and exit."""
    cli()
    raise AssertionError("click exits by itself")
