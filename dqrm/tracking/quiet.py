"""Import MLflow without its chatter, its telemetry and its minutes of retries.

MLflow reports usage to its makers unless MLFLOW_DISABLE_TELEMETRY or DO_NOT_TRACK says otherwise.
Training a model should not phone anybody, so dqrm sets MLFLOW_DISABLE_TELEMETRY=true; set it to
false yourself to report.
"""

import importlib
import logging
import os
import warnings
from types import ModuleType

# Only where the user has not decided. Retries are ours (see mlflow_tracker): MLflow's own seven
# take four minutes against a closed port, during which nothing else could be done.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

# MLflow's and Alembic's INFO lines on a fresh database are some sixty; the client's warnings about
# a server that is away repeat what dqrm says once.
_LEVELS = {
    "mlflow": logging.ERROR,
    "alembic": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}


def import_mlflow() -> ModuleType:
    """Return the ``mlflow`` package, imported quietly. Takes about 2 s the first time."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = importlib.import_module("mlflow")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name, level in _LEVELS.items():
            logging.getLogger(name).setLevel(level)
    return mlflow
