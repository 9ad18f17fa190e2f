"""Samples of CPU, memory, disk, network and GPU, taken by MLflow's own collectors.

MLflow's monitor stops for good when the store is away once, and writes past our journal. So its
collectors are used and its monitor is not.
"""

import importlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dqrm.tracking.quiet import import_mlflow

_log = logging.getLogger(__name__)

_COLLECTORS = (
    ("cpu_monitor", "CPUMonitor"),
    ("disk_monitor", "DiskMonitor"),
    ("network_monitor", "NetworkMonitor"),
    ("gpu_monitor", "GPUMonitor"),
)

SAMPLE_SECONDS = 10.0  # MLflow's default sampling_interval


class SystemMetrics:
    """Calls ``record(values, step)`` every 10 s and once when stopped, from a thread of its own.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL changes the interval and MLFLOW_SYSTEM_METRICS_NODE_ID
    the node in ``system/<node>/cpu_utilization_percentage``, which is otherwise ``rank0`` on
    every host, so that runs on different hosts share a chart.
    """

    def __init__(self, record: Callable[[Mapping[str, float], int], None]) -> None:
        self._record = record
        self._prefix = f"system/{os.environ.get('MLFLOW_SYSTEM_METRICS_NODE_ID') or 'rank0'}/"
        self._seconds = float(
            os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SAMPLE_SECONDS
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Take a last sample and end; leave the thread behind when it takes longer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            collectors = _collectors()
            for collector in collectors:
                # CPU use is counted from the call before: the first would say 0.
                collector.collect_metrics()
                collector.clear_metrics()
            step = 0
            while True:
                stopped = self._stop.wait(self._seconds)
                values: dict[str, float] = {}
                for collector in collectors:
                    collector.collect_metrics()
                    values |= collector.aggregate_metrics()
                    collector.clear_metrics()
                self._record({self._prefix + key: value for key, value in values.items()}, step)
                step += 1
                if stopped:
                    return
        except Exception as error:
            # A machine that hides its counters costs the charts, never the training.
            _log.warning("system metrics stop: %s: %s", type(error).__name__, error)


def _collectors() -> list[Any]:
    import_mlflow()
    # Not a public interface of MLflow: one that is gone is left out.
    collectors = []
    for module, name in _COLLECTORS:
        try:
            package = importlib.import_module(f"mlflow.system_metrics.metrics.{module}")
            collectors.append(getattr(package, name)())
        except Exception:
            _log.debug("no %s", name, exc_info=True)
    return collectors
