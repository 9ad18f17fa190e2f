"""What a user reads, and which exit code a scheduler gets, when a command does not succeed."""

import errno
import traceback
from enum import IntEnum

import click


class ExitCode(IntEnum):
    """Exit codes of every command; a run stopped by a signal adds its number to 128."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    GATE_NOT_MET = 3
    INTERRUPTED = 130


_FULL_DISK = "free some space, or write to another disk"
_OS_ADVICE = {
    errno.ENOSPC: _FULL_DISK,
    errno.EDQUOT: _FULL_DISK,
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
}


def report(error: BaseException, debug: bool) -> int:
    """Write why a command ended to standard error and return its exit code.

    A mistake of the user or a failure of the machine is one message. Anything else is a defect
    of dqrm and shows its traceback, as every error does with ``debug``.
    """
    if isinstance(error, click.Abort):
        if not isinstance(error.__cause__, EOFError):
            click.echo("interrupted", err=True)
            return ExitCode.INTERRUPTED
        error = error.__cause__
    if isinstance(error, click.ClickException):
        if debug:
            traceback.print_exception(error)
        error.show()
        return error.exit_code
    code, message = _explain(error)
    if debug or message is None:
        traceback.print_exception(error)
    if message is None:
        click.echo(
            "Error: this is a defect of dqrm; please report it with the lines above", err=True
        )
    else:
        click.echo(f"Error: {message}", err=True)
    return code


def _explain(error: BaseException) -> tuple[ExitCode, str | None]:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return ExitCode.USAGE, _os_message(error)
    if isinstance(error, OSError):
        return ExitCode.FAILED, _os_message(error)
    if isinstance(error, ValueError):
        return ExitCode.USAGE, str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            ExitCode.FAILED,
            "not enough memory; `dqrm train --dry-run` with the same configuration shows what a "
            "run needs",
        )
    if isinstance(error, EOFError):
        return ExitCode.FAILED, f"a file ended too early: {error}"
    # Errors that dqrm and MLflow define carry messages written for people.
    module = type(error).__module__.partition(".")[0]
    if module in ("dqrm", "mlflow"):
        return ExitCode.FAILED, str(error)
    return ExitCode.FAILED, None


def _os_message(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    advice = _OS_ADVICE.get(error.errno or 0)
    return f"{place}{error.strerror}" + (f"; {advice}" if advice else "")
