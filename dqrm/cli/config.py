"""``dqrm config``: what a command would run with."""

import json
from typing import Any

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import RUN_MODEL, OverrideType, config_option, import_model

MODELS = {
    "train": RUN_MODEL,
    "prepare": "dqrm.data.config:PrepareConfig",
    "synth": "dqrm.data.synth:SynthConfig",
}

_EXAMPLES = [
    ("dqrm config quant.bits=8", "every value of a run and what it means"),
    ("dqrm config --config census > mine.yaml", "a file to edit, then train --config mine.yaml"),
    ("dqrm config --fields", "one line a key: type, default, help"),
    (
        "dqrm config --schema > dqrm.schema.json",
        "a JSON schema; editors complete and check with it",
    ),
]


class _Overrides(OverrideType):
    """Overrides of the model that ``--for`` names."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        self.model = MODELS[ctx.params.get("command") or "train"]
        return super().shell_complete(ctx, param, incomplete)


@click.command("config", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@click.option(
    "--for",
    "command",
    type=click.Choice(list(MODELS)),
    default="train",
    show_default=True,
    help="The command whose configuration is meant.",
)
@click.option("--fields", "form", flag_value="fields", help="List keys, types, defaults, help.")
@click.option("--schema", "form", flag_value="schema", help="Print the JSON schema.")
@click.option("--json", "form", flag_value="json", help="Print the resolved values as JSON.")
@click.argument("overrides", nargs=-1, type=_Overrides(RUN_MODEL), metavar="[KEY=VALUE]...")
def config(source: str | None, command: str, form: str | None, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration.

    It is YAML that --config reads back, each key under its help. Values come from the defaults,
    then the file, then the overrides.
    """
    from dqrm.configuration import describe_fields, load, to_yaml

    model = import_model(MODELS[command])
    if form == "schema":
        click.echo(json.dumps(model.model_json_schema(by_alias=True), indent=2))
        return
    if form == "fields":
        for field in describe_fields(model):
            click.echo(f"{field.path} ({field.kind}; default {field.default})")
            click.echo(f"    {field.help}")
        return
    resolved = load(model, source, overrides)
    if form == "json":
        click.echo(json.dumps(resolved.model_dump(mode="json", by_alias=True), indent=2))
    else:
        click.echo(to_yaml(resolved), nl=False)
