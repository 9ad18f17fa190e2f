"""Parameters that several commands share, with their shell completion."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pydantic import BaseModel

Function = TypeVar("Function", bound=Callable[..., Any])

RUN_MODEL = "dqrm.config:RunConfig"


def import_model(reference: str) -> "type[BaseModel]":
    """Import a configuration model named ``module:class``."""
    module, _, name = reference.partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    return model


class OverrideType(click.ParamType[str, str]):
    """``key.path=value``; completes keys of a model, and values where there are only a few."""

    name = "override"

    def __init__(self, model: str) -> None:
        self.model = model

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what has no ``=``; the value itself is checked with the whole configuration."""
        text = str(value)
        if "=" not in text:
            hint = f"; did you mean --config {text}?" if text.endswith((".yaml", ".yml")) else ""
            self.fail(f"'{text}' is not key=value, such as quant.bits=4{hint}", param, ctx)
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the key up to ``=``, then its value."""
        from dqrm.configuration import describe_fields

        key, equals, value = incomplete.partition("=")
        fields = describe_fields(import_model(self.model))
        if not equals:
            return [
                CompletionItem(f"{field.path}=", help=field.help)
                for field in fields
                if field.path.startswith(key)
            ]
        return [
            CompletionItem(f"{key}={choice}")
            for field in fields
            if field.path == key
            for choice in field.choices
            if choice.startswith(value)
        ]


class ConfigSource(click.ParamType[str, str]):
    """A YAML file or the name of a shipped configuration."""

    name = "name|file"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete shipped names, and file names beside them."""
        from dqrm.configuration import shipped_configs

        names = [
            CompletionItem(name, help=line)
            for name, line in shipped_configs().items()
            if name.startswith(incomplete)
        ]
        return names or [CompletionItem(incomplete, type="file")]


def config_option() -> Callable[[Function], Function]:
    """``--config``: where values come from before the overrides."""
    return click.option(
        "--config",
        "-c",
        "source",
        type=ConfigSource(),
        metavar="NAME|FILE",
        help="Shipped configuration (`dqrm configs ls`) or YAML file; defaults without it.",
    )


def overrides_argument(model: str = RUN_MODEL) -> Callable[[Function], Function]:
    """``[KEY=VALUE]...``: dotted overrides, the last word on every value."""
    return click.argument("overrides", nargs=-1, type=OverrideType(model), metavar="[KEY=VALUE]...")
