"""``dqrm ui``: MLflow's page on the store that runs are recorded in."""

import os
import socket
import sys

import click

from dqrm.cli.framework import DqrmCommand

DEFAULT_PORT = 5000

_EXAMPLES = [
    ("dqrm ui", "the runs of this folder, at http://127.0.0.1:5000"),
    ("dqrm ui --port 5050 --backend-store-uri sqlite:///mlflow.db", "another port and store"),
]


@click.command("ui", cls=DqrmCommand, examples=_EXAMPLES)
@click.option(
    "--port", "-p", type=click.IntRange(1, 65535), default=DEFAULT_PORT, show_default=True
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--backend-store-uri",
    metavar="URI",
    help="Store to show; by default MLFLOW_TRACKING_URI, else mlflow.db in this folder.",
)
def ui(port: int, host: str, backend_store_uri: str | None) -> None:
    """Open MLflow's page on the store that runs are recorded in. Ctrl-C ends it."""
    from dqrm.tracking.uri import resolve_uri, sqlite_file

    uri = resolve_uri(backend_store_uri)
    if uri.startswith(("http://", "https://")):
        click.echo(f"the store is a server; open {uri}")
        return
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise click.UsageError(
            f"{file}: no runs are recorded there; go to the folder you trained in, or name the "
            "store with --backend-store-uri"
        )
    _require_free(host, port)
    click.echo(f"MLflow shows {uri}\nopen http://{host}:{port} (ready in some seconds)", err=True)
    sys.stderr.flush()
    # One worker: the default four take most of a gigabyte for a single reader. The process is
    # replaced, so that Ctrl-C and signals reach MLflow itself.
    os.execv(
        sys.executable,
        [
            sys.executable,
            *("-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", uri, "--host", host, "--port", str(port)),
        ],
    )


def _require_free(host: str, port: int) -> None:
    problem = _bind_problem(host, port)
    if problem is None:
        return
    if port < 1024:
        raise click.UsageError(f"cannot listen on {host}:{port}: {problem}; try a port over 1024")
    free = next((p for p in range(port + 1, port + 50) if _bind_problem(host, p) is None), None)
    advice = f"try --port {free}" if free else "choose another --host or --port"
    raise click.UsageError(f"cannot listen on {host}:{port}: {problem}; {advice}")


def _bind_problem(host: str, port: int) -> str | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
