"""Which tracking store a run goes to."""

import os
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "dqrm"

LOCAL_PAGE = "http://127.0.0.1:5000"
"""Where ``dqrm ui`` listens unless told otherwise."""

_SQL = ("postgresql", "mysql", "mssql", "sqlite")


def resolve_uri(uri: str | None) -> str:
    """Return the store to use: ``uri``, else MLFLOW_TRACKING_URI, else SQLite in this folder.

    The path of an SQLite file is made absolute, so that an upload started later from another
    folder reaches the same file.

    Raises:
        ValueError: for a store that cannot work; the message names the fix.
    """
    if uri is not None:
        source = f"tracking.uri={uri}"
    elif os.environ.get("MLFLOW_TRACKING_URI"):
        uri = os.environ["MLFLOW_TRACKING_URI"]
        source = f"MLFLOW_TRACKING_URI={uri}"
    else:
        uri = DEFAULT_URI
        source = f"default store {uri}"
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https") or scheme.startswith(("databricks", "uc")):
        return uri.rstrip("/")
    if scheme == "sqlite":
        return _absolute_sqlite(uri, source)
    if scheme in _SQL:
        return uri
    if scheme in ("", "file"):
        return _file_store(uri, source)
    raise ValueError(
        f"{source}: unknown kind of store '{scheme}:'; use sqlite:///FILE.db, http://HOST:PORT "
        "or a database such as postgresql://..."
    )


def experiment_name(name: str | None) -> str:
    """Return ``name``, else MLFLOW_EXPERIMENT_NAME, else ``dqrm``."""
    return name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def sqlite_file(uri: str) -> Path | None:
    """Return the file behind an SQLite URI, or None for any other store."""
    if not uri.startswith("sqlite:"):
        return None
    path = uri.partition("///")[2].partition("?")[0]
    return Path(path) if path and path != ":memory:" else None


def run_url(uri: str, experiment_id: str, run_id: str) -> str | None:
    """Return the page of a run on a tracking server, or None for a store without pages."""
    if uri.startswith(("http://", "https://")):
        return f"{uri}/#/experiments/{experiment_id}/runs/{run_id}"
    return None


def page_of(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the page of a run; of a store without a server, where ``dqrm ui`` shows it."""
    page = run_url(uri, experiment_id, run_id) or run_url(LOCAL_PAGE, experiment_id, run_id)
    assert page is not None
    return page


def _absolute_sqlite(uri: str, source: str) -> str:
    file = sqlite_file(uri)
    if file is None:
        raise ValueError(f"{source}: name a file, for example {DEFAULT_URI}")
    if file.is_dir():
        raise ValueError(f"{source}: {file} is a folder; name a file in it")
    head, _, rest = uri.partition("///")
    query = rest.partition("?")[2]
    return f"{head}///{file.absolute()}" + (f"?{query}" if query else "")


def _file_store(uri: str, source: str) -> str:
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return uri
    raise ValueError(
        f"{source}: MLflow no longer writes to folders; use {DEFAULT_URI}, move old runs there "
        "with `mlflow migrate-filestore`, or set MLFLOW_ALLOW_FILE_STORE=true"
    )
