"""Runs read from MLflow."""

import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dqrm.comparison.metrics import higher_is_better
from dqrm.comparison.record import (
    COMPARISON_TAG,
    ComparedRun,
    Curve,
    is_drawn,
    settings_of,
    with_medians,
)
from dqrm.tracking.measurements import MEASUREMENTS_FILE, Measurements, read_measurements
from dqrm.tracking.store import Store, translated
from dqrm.tracking.uri import page_of

_NOT_COMPARED = ("system/",)
_FACTS = {
    "command": "mlflow.source.name",
    "commit": "mlflow.source.git.commit",
    "uncommitted changes": "git.dirty",
    "processor": "cpu.model",
    "threads": "cpu.threads",
    "kernels": "kernels",
    "dqrm": "version.dqrm",
    "torch": "version.torch",
    "resumed": "resumed",
}
_PAGE = 1000


class StoredRuns:
    """The runs of a tracking store.

    Args:
        uri: of the store.
        experiment: only runs of this one; of all when not given.
    """

    def __init__(self, uri: str, experiment: str | None = None) -> None:
        self.store = Store(uri)
        with translated():
            experiments = self.store.client.search_experiments()
        names = {found.name: found.experiment_id for found in experiments}
        if experiment is not None and experiment not in names:
            raise ValueError(
                f"there is no experiment {experiment} in {uri}; there are: {', '.join(names)}"
            )
        self._experiments = {id_: name for name, id_ in names.items() if experiment in (None, name)}
        self._found: list[Any] | None = None

    def all(self) -> list[Any]:
        """Return the ``mlflow.entities.Run`` of each active run, the newest first."""
        if self._found is None:
            self._found = [run for run in self._pages() if COMPARISON_TAG not in run.data.tags]
        return self._found

    def best(self, metric: str, count: int) -> list[Any]:
        """Return the ``count`` runs that are best by a metric, the best first.

        Raises:
            ValueError: no run has the metric.
        """
        measured = [run for run in self.all() if run.data.metrics.get(metric) is not None]
        if not measured:
            known = sorted({name for run in self.all() for name in run.data.metrics})
            shown = [name for name in known if not name.startswith(_NOT_COMPARED)]
            raise ValueError(
                f"--by {metric}: no run here has it; there are: {', '.join(shown) or 'no metrics'}"
            )
        sign = -1 if higher_is_better(metric) else 1
        # NaN, of a split with one class only, is the worst of all.
        return sorted(measured, key=lambda run: _rank(sign * run.data.metrics[metric]))[:count]

    def read(self, run: Any) -> ComparedRun:
        """Return a run with its curves and measurements."""
        info, tags, parameters = run.info, run.data.tags, dict(run.data.params)
        metrics = {
            name: float(value)
            for name, value in run.data.metrics.items()
            if not name.startswith(_NOT_COMPARED)
        }
        curves = {name: self._curve(info.run_id, name) for name in metrics if is_drawn(name)}
        steps = parameters.get("steps_per_epoch")
        world = {k: v for k, v in parameters.items() if k == "world_size"}
        return ComparedRun(
            name=info.run_name or info.run_id,
            status=info.status,
            source=self.store.uri,
            settings=settings_of(parameters) | world,
            metrics=with_medians(metrics, curves),
            curves=curves,
            measurements=self._measurements(info.run_id),
            steps_per_epoch=int(steps) if steps else None,
            run_id=info.run_id,
            experiment=self._experiments[info.experiment_id],
            url=page_of(self.store.uri, info.experiment_id, info.run_id),
            facts=dict(_facts(info, tags)),
        )

    def _pages(self) -> Iterator[Any]:
        token = None
        while True:
            with translated():
                page = self.store.client.search_runs(
                    list(self._experiments), max_results=_PAGE, page_token=token
                )
            yield from page
            token = page.token
            if not token:
                return

    def _curve(self, run_id: str, metric: str) -> Curve:
        with translated():
            points = self.store.client.get_metric_history(run_id, metric)
        return tuple(sorted((int(point.step), float(point.value)) for point in points))

    def _measurements(self, run_id: str) -> Measurements | None:
        with translated():
            names = [file.path for file in self.store.client.list_artifacts(run_id)]
            if MEASUREMENTS_FILE not in names:
                return None
            with tempfile.TemporaryDirectory() as folder:
                path = self.store.client.download_artifacts(run_id, MEASUREMENTS_FILE, folder)
                return read_measurements(Path(path))


def _rank(value: float) -> tuple[bool, float]:
    return value != value, value


def _facts(info: Any, tags: dict[str, str]) -> Iterator[tuple[str, str]]:
    began = datetime.fromtimestamp(info.start_time / 1000, UTC)
    yield "started", f"{began:%Y-%m-%d %H:%M} UTC"
    if info.end_time:
        yield "took", f"{(info.end_time - info.start_time) / 1000:.0f} s"
    for name, tag in _FACTS.items():
        if tag in tags:
            yield name, tags[tag]


def named(runs: Sequence[Any], word: str) -> list[Any]:
    """Return the runs that ``word`` names: by id, else by name, else by a beginning of either."""
    by_id = [run for run in runs if run.info.run_id == word]
    by_name = [run for run in runs if run.info.run_name == word]
    return by_id or by_name or [run for run in runs if _begins(run, word)]


def _begins(run: Any, word: str) -> bool:
    return str(run.info.run_id).startswith(word) or str(run.info.run_name).startswith(word)
