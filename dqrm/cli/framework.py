"""The click classes under every command: options they share, examples, late imports, errors."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from dqrm.cli import errors, logs

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

COMPLETE_VARIABLE = "_DQRM_COMPLETE"
"""Environment variable in which the shell scripts ask for completions."""

_VERBOSITY = "dqrm.verbosity"
_DEBUG = "dqrm.debug"


def _remember(key: str, value: int) -> Any:
    def callback(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            ctx.meta[key] = value  # one dictionary for the group and its commands

    return callback


def _common_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_remember(_VERBOSITY, 1),
            help="Log details, with times.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_remember(_VERBOSITY, -1),
            help="Log warnings only.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_remember(_DEBUG, 1),
            help="Show the traceback of an error.",
        ),
    ]


class DqrmCommand(click.Command):
    """A command with --verbose, --quiet and --debug, and with examples that a test runs."""

    def __init__(
        self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any
    ) -> None:
        settings["context_settings"] = CONTEXT_SETTINGS | settings.get("context_settings", {})
        super().__init__(*args, **settings)
        self.params += _common_options()
        self.examples = tuple(examples)
        """Pairs of a command line and what it does."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options."""
        write_examples(self.examples, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Set up logging, then run the command."""
        logs.set_up(ctx.meta.get(_VERBOSITY, 0))
        return super().invoke(ctx)


def write_examples(examples: Sequence[tuple[str, str]], formatter: click.HelpFormatter) -> None:
    """Write commands as they are typed, each under a line that says what it does."""
    if not examples:
        return
    with formatter.section("Examples"):
        for command, purpose in examples:
            formatter.write(f"{'':>{formatter.current_indent}}# {purpose}\n")
            formatter.write(f"{'':>{formatter.current_indent}}{command}\n")


class LazyGroup(click.Group):
    """A group that imports a command's module when it is run, not when it is listed.

    Args:
        lazy: for each command its ``module:attribute`` and its line in the list.
    """

    def __init__(
        self,
        *args: Any,
        lazy: Mapping[str, tuple[str, str]],
        examples: Sequence[tuple[str, str]] = (),
        **settings: Any,
    ) -> None:
        settings["context_settings"] = CONTEXT_SETTINGS
        super().__init__(*args, **settings)
        self.params += _common_options()
        self.lazy = dict(lazy)
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order they were given."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None where there is none of that name."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest name out of the commands not imported yet."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(
                error.command_name, possibilities=list(self.lazy), ctx=ctx
            ) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names of commands without importing them, and the group's options."""
        names = [
            CompletionItem(name, help=line)
            for name, (_, line) in self.lazy.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the list of commands."""
        write_examples(self.examples, formatter)


class RootGroup(LazyGroup):
    """The outermost group: turns whatever a command raises into a message and an exit code."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "dqrm",
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; exits the process unless ``standalone_mode`` is off."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        arguments = sys.argv[1:] if args is None else list(args)
        if COMPLETE_VARIABLE in os.environ:
            importlib.import_module("dqrm.cli.completion")
        # The option may stand anywhere, and parsing itself may be what fails.
        debug = "--debug" in arguments
        try:
            result = super().main(arguments, prog_name, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else errors.ExitCode.DONE
        except Exception as error:
            code = errors.report(error, debug)
        sys.exit(int(code))
