"""Where runs are recorded."""

from pydantic import PositiveFloat

from dqrm.settings import Settings


class TrackingConfig(Settings):
    """MLflow settings; the environment variables of MLflow are honored."""

    enabled: bool = True
    """Record the run in MLflow."""

    uri: str | None = None
    """Tracking store; MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""

    experiment: str | None = None
    """MLflow experiment the run belongs to; MLFLOW_EXPERIMENT_NAME, else dqrm."""

    register_as: str | None = None
    """Register the final model under this name in the model registry."""

    checkpoint: bool = True
    """Upload the selected checkpoint beside the final model."""

    system_metrics: bool = True
    """Record CPU, memory, disk and network use beside the metrics."""

    tags: dict[str, str] = {}
    """Extra tags of the run."""

    flush_seconds: PositiveFloat = 5.0
    """Seconds between uploads to the store."""

    finish_seconds: PositiveFloat = 30.0
    """Seconds without progress after which the end of a run stops waiting for the store."""
