"""Which runs a command line means."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.comparison.folders import is_run_folder, read_folder
from dqrm.comparison.record import COMPARISON_FILE, ComparedRun, distinct
from dqrm.tracking.uri import resolve_uri, sqlite_file

if TYPE_CHECKING:
    from dqrm.comparison.mlflow_runs import StoredRuns

RUNS = Path("runs")
"""Where names of runs are looked for first; ``output`` of a run's settings unless changed."""

_SUGGESTIONS = 3
_SHORTEST_PREFIX = 3


class Finder:
    """Finds runs by folder, by name, or by id in the tracking store.

    Args:
        uri: of the store; as everywhere when not given.
        experiment: in which runs of the store are looked for; all of them when not given.
    """

    def __init__(self, uri: str | None = None, experiment: str | None = None) -> None:
        self._uri = uri
        self._experiment = experiment
        self._opened: StoredRuns | None = None

    def find(self, words: Iterable[str]) -> list[ComparedRun]:
        """Return what the words name, each run once: folders, names, ids, or unique beginnings.

        Folders come first and need no store; with an experiment named, only its runs count.

        Raises:
            FileNotFoundError: there is no such run; the message names the nearest ones.
            ValueError: a word fits several runs, or is no run.
        """
        # `runs/*` takes in what earlier comparisons left there.
        wanted = [word for word in words if not (Path(word) / COMPARISON_FILE).is_file()]
        found = [run for word in wanted for run in self._one(word)]
        if not found:
            raise ValueError("these are comparisons; name the runs to compare")
        # Where a run is known by its id, a folder and the store are the same run.
        once = {run.run_id or run.source: run for run in reversed(found)}
        return distinct([run for run in found if once[run.run_id or run.source] is run])

    def best(self, metric: str, count: int) -> list[ComparedRun]:
        """Return the best runs of the experiment, or of the store, by a metric."""
        store = self._store()
        if store is None:
            raise FileNotFoundError(self._no_store())
        return distinct([store.read(run) for run in store.best(metric, count)])

    def _one(self, word: str) -> list[ComparedRun]:
        if self._experiment is None:
            folder = self._folder(word)
            if folder is not None:
                return read_folder(folder)
        store = self._store()
        if store is not None:
            from dqrm.comparison.mlflow_runs import named

            found = named(store.all(), word)
            if len(found) == 1:
                return [store.read(found[0])]
            if found:
                names = ", ".join(f"{run.info.run_id[:12]} ({run.info.run_name})" for run in found)
                raise ValueError(f"{word} fits {len(found)} runs: {names}; say which by its id")
        raise FileNotFoundError(self._unknown(word))

    def _folder(self, word: str) -> Path | None:
        for path in (Path(word), RUNS / word):
            if is_run_folder(path):
                return path
        if Path(word).exists():
            raise ValueError(f"{word}: this is no run: it has no config.yaml or stage.json")
        if len(word) >= _SHORTEST_PREFIX and "/" not in word:
            fits = [path for path in _run_folders() if path.name.startswith(word)]
            if len(fits) > 1:
                names = ", ".join(path.name for path in fits)
                raise ValueError(
                    f"{word} fits {len(fits)} runs: {names}; write one of them out, or name all of "
                    f"them as {RUNS}/{word}*"
                )
            return fits[0] if fits else None
        return None

    def _store(self) -> "StoredRuns | None":
        """The store; None where there is none yet, so that looking does not make one."""
        if self._opened is None:
            uri = resolve_uri(self._uri)
            file = sqlite_file(uri)
            if file is not None and not file.is_file():
                return None
            from dqrm.comparison.mlflow_runs import StoredRuns

            self._opened = StoredRuns(uri, self._experiment)
        return self._opened

    def _no_store(self) -> str:
        return (
            f"no runs are recorded in {resolve_uri(self._uri)}; go to the folder you trained in, "
            "or name the store with --tracking-uri"
        )

    def _unknown(self, word: str) -> str:
        names = [] if self._experiment else [path.name for path in _run_folders()]
        places = [] if self._experiment else [f"folder {RUNS}"]
        store = self._store()
        if store is not None:
            names += [run.info.run_name for run in store.all()]
            where = f"experiment {self._experiment} of " if self._experiment else ""
            places.append(f"{where}{store.store.uri}")
        near = _nearest(word, names)
        advice = (
            f"did you mean {' or '.join(near)}?" if near else f"looked in {' and '.join(places)}"
        )
        return f"{word}: no such run; {advice}"


def _run_folders() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if is_run_folder(path))


def _nearest(word: str, names: Sequence[str]) -> list[str]:
    last = word.rstrip("/").rpartition("/")[2]
    return difflib.get_close_matches(last, dict.fromkeys(names), n=_SUGGESTIONS, cutoff=0.5)
