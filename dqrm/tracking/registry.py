"""Versions of a model in MLflow's registry, and the one that is the champion.

Every call may be repeated after it was cut off: what an earlier try made is taken up.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dqrm.data.files import new_folder
from dqrm.serving.predictor import ARTIFACT_FILE
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.errors import Refused, StoreAway
from dqrm.tracking.model_reference import CHAMPION, PREVIOUS, ModelReference
from dqrm.tracking.models import register
from dqrm.tracking.store import Store, translated
from dqrm.tracking.uri import resolve_uri, sqlite_file


def resolve(reference: ModelReference, tracking: TrackingConfig) -> str | None:
    """Return the version that ``reference`` means now; None where nothing has the alias yet.

    Nothing is made in the store.

    Raises:
        ValueError: nothing is recorded, or there is no such version.
        StoreError: the store does not answer.
    """
    uri = _uri(tracking)
    file = None if os.environ.get("MLFLOW_REGISTRY_URI") else sqlite_file(uri)
    registry = None if file is not None and not file.is_file() else Registry(uri)
    if reference.alias is not None:
        return registry.aliases(reference.name).get(reference.alias) if registry else None
    assert reference.version is not None
    if registry is None or registry.version(reference.name, reference.version) is None:
        raise ValueError(f"{reference.name} has no version {reference.version} in {uri}")
    return reference.version


def _uri(tracking: TrackingConfig) -> str:
    if not tracking.enabled:
        raise ValueError("the model registry is MLflow's: it needs tracking.enabled")
    return resolve_uri(tracking.uri)


class Registry:
    """The registry beside a tracking store. Every method raises StoreError where it fails."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._store = Store(uri)
        self._client = self._store.client

    @classmethod
    def of(cls, tracking: TrackingConfig) -> "Registry":
        """The registry that these settings lead to; ValueError where nothing is recorded."""
        return cls(_uri(tracking))

    def aliases(self, name: str) -> dict[str, str]:
        """Return the version of each alias of a model; none of a model that is not there."""
        with translated():
            found = self._client.search_registered_models(f"name = '{name}'")
            return {a: str(v) for model in found for a, v in model.aliases.items()}

    def version(self, name: str, version: str) -> Any | None:
        """Return a version as MLflow has it, or None."""
        return next((v for v in self.versions(name) if str(v.version) == version), None)

    def versions(self, name: str) -> list[Any]:
        """Return all versions of a model, oldest first."""
        with translated():
            found = self._client.search_model_versions(f"name = '{name}'")
            return sorted(found, key=lambda version: int(version.version))

    def register(self, name: str, run_id: str, tags: Mapping[str, str]) -> str:
        """Register the model of a run, once, and set tags of its version; return the version."""
        outputs = self._store.run(run_id).outputs
        models = outputs.model_outputs if outputs else []
        if not models:
            raise StoreAway(
                f"the model of run {run_id} is not in {self.uri}; `dqrm tracking sync` uploads "
                "what the store missed"
            )
        with translated():
            register(self._store, run_id, models[-1].model_id, name)
            version = str(next(v for v in self.versions(name) if v.run_id == run_id).version)
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)
        return version

    def crown(self, name: str, version: str) -> None:
        """Make a version the champion; the one that was is ``previous`` from then on.

        The champion's alias moves last and in one step, so whoever looks meanwhile, or after a
        kill, finds the old champion or the new one.
        """
        with translated():
            before = self.aliases(name).get(CHAMPION)
            if before == version:
                return
            if before is not None:
                self._client.set_registered_model_alias(name, PREVIOUS, before)
            self._client.set_registered_model_alias(name, CHAMPION, version)

    def download_model(self, name: str, version: str, folder: Path) -> Path:
        """Bring the packed model of a version to ``folder``; return its file.

        Nothing is done where it is there already.
        """
        target = folder / ARTIFACT_FILE
        if target.is_file():
            return target
        from mlflow.artifacts import download_artifacts

        with TemporaryDirectory(dir=_made(folder.parent)) as temporary:
            with translated():
                found = self._client.get_model_version(name, version)
                place = (
                    self._client.get_logged_model(found.model_id).artifact_location
                    if found.model_id
                    else self._client.get_model_version_download_uri(name, version)
                )
                download_artifacts(place, dst_path=temporary, tracking_uri=self.uri)
            files = list(Path(temporary).rglob(ARTIFACT_FILE))
            if len(files) != 1:
                raise Refused(f"version {version} of {name} holds no packed model of dqrm")
            with new_folder(folder) as complete:
                files[0].rename(complete / ARTIFACT_FILE)
        return target

    def download_checkpoint(self, name: str, version: str, folder: Path) -> Path:
        """Bring the checkpoint that a version was packed from to ``folder``; return the folder.

        Nothing is done where it is there already.

        Raises:
            ValueError: its run keeps none.
        """
        if folder.is_dir():
            return folder
        with TemporaryDirectory(dir=_made(folder.parent)) as temporary:
            with translated():
                run_id = self._client.get_model_version(name, version).run_id
                kept = self._client.list_artifacts(run_id, "checkpoints") if run_id else []
            if not kept:
                raise ValueError(
                    f"version {version} of {name}: its run has no checkpoint in {self.uri}; "
                    "train with tracking.checkpoint=true"
                )
            last = str(kept[-1].path)
            with translated():
                found = Path(self._client.download_artifacts(run_id, last, temporary))
            with new_folder(folder) as complete:
                for file in found.iterdir():
                    file.rename(complete / file.name)
        return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
