"""The dqrm command."""

from dqrm.cli.app import cli, main

__all__ = ["cli", "main"]
