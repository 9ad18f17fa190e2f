"""``dqrm ui``: MLflow's page on the store that runs are recorded in."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time

import click

from dqrm.cli.framework import DqrmCommand

DEFAULT_PORT = 5000

_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0

_EXAMPLES = [
    ("dqrm ui", "the runs of this folder, at http://127.0.0.1:5000"),
    ("dqrm ui --port 5050 --backend-store-uri sqlite:///mlflow.db", "another port and store"),
]


@click.command("ui", cls=DqrmCommand, examples=_EXAMPLES)
@click.option(
    "--port",
    "-p",
    type=click.IntRange(1, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--backend-store-uri",
    metavar="URI",
    help="Store to show; by default MLFLOW_TRACKING_URI, else mlflow.db in this folder.",
)
def ui(port: int, host: str, backend_store_uri: str | None) -> None:
    """Open the MLflow page on the store that runs are recorded in.

    Ctrl-C ends it.
    """
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
    _serve(uri, host, port)


def _serve(uri: str, host: str, port: int) -> None:
    """Run MLflow's server until it ends or somebody ends us."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *("--host", host, "--port", str(port)),
        # The default four workers take most of a gigabyte for a single reader.
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    ]
    environment = {
        # Job processes serve features of language models; they start slowly and end slower.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
    }
    click.echo(f"starting MLflow on {uri}", err=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # In a session of its own, so that Ctrl-C reaches only this process, which then ends them all:
    # a Ctrl-C sent to every process of MLflow makes each write a traceback.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        if _wait_ready(server, host, port):
            click.echo(f"open http://{host}:{port} (Ctrl-C ends)", err=True)
        server.wait()
    except KeyboardInterrupt:
        click.echo("stopping", err=True)
    finally:
        _end(server)
    if server.returncode > 0:
        raise click.ClickException(f"MLflow's server ended with exit code {server.returncode}")


def _wait_ready(server: "subprocess.Popen[bytes]", host: str, port: int) -> bool:
    """Whether the server answers; False when it ended instead."""
    # An address that means every interface is asked on the loopback one.
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while server.poll() is None:
        connection = http.client.HTTPConnection(asked, port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status < 500:
                return True
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(_POLL_SECONDS)
    return False


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server and its processes, with force when they do not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)


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
