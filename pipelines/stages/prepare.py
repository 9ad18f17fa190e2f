"""``stage: prepare``: the raw rows of a day as a data set to train on.

Its output holds ``data/``, what ``dqrm data prepare`` would have written. Rows to test on are those
of the following day, so that a model is measured as it will be used: on what comes after it.
"""

import glob
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from dqrm.configuration import load
from dqrm.pipelines.stage import DATA_FOLDER, Interrupted, Problem, Product, Stage, StageContext
from dqrm.pipelines.stages.overrides import as_overrides
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.model_reference import ModelReference

if TYPE_CHECKING:
    from dqrm.data.config import PrepareConfig
    from dqrm.data.schema import Schema
    from dqrm.data.vocabulary import Base

log = logging.getLogger(__name__)

NONE_YET = "none"
"""What a reference to an alias means before any version has it."""

Files = Annotated[tuple[Path, ...], Field(min_length=1)]


class PrepareStage(Stage):
    """Prepare raw rows."""

    makes: ClassVar[Product] = "data set"

    stage: Literal["prepare"] = "prepare"
    """Prepare raw rows, as dqrm data prepare does."""

    train: Files
    """Files of rows to train on."""

    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of them to select on."""

    seed: NonNegativeInt = 0
    """Decides which."""

    test: tuple[Path, ...] = ()
    """Files of rows to test on: those of the following day."""

    base: str | None = None
    """Whose ids are kept: a prepared data set, or a model such as models:/clicks@champion. As long
    as no version has the alias, ids are counted anew."""

    growth: Literal["append", "none"] = "append"
    """Values that the base does not know get ids after all of its own (append), or none."""

    config: str | None = None
    """YAML file of `dqrm data prepare`; defaults without it."""

    settings: dict[str, Any] = {}
    """Values over it: {format: parquet, min_frequency: 5}."""

    @model_validator(mode="after")
    def _resolves(self) -> Self:
        if "split" in self.settings:
            raise ValueError("settings.split is what train, validation_fraction and test say")
        if both := set(self.train) & set(self.test):
            raise ValueError(f"{min(both)} is both in train and in test")
        if self.base is not None:
            ModelReference.parse(self.base)
        try:
            self.resolved()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        return self

    def resolved(self) -> "PrepareConfig":
        """How the rows are read."""
        from dqrm.data.config import PrepareConfig

        split = {
            "by": "file",
            "test": [glob.escape(str(path)) for path in self.test],
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
        }
        return load(PrepareConfig, self.config, as_overrides({**self.settings, "split": split}))

    def identity(self) -> dict[str, Any]:
        """How the rows are read; from which files is among the sources."""
        config = self.resolved().model_dump(mode="json", by_alias=True, exclude={"workers"})
        base = {"base": self.base, "growth": self.growth} if self.base else {}
        return {"stage": self.stage, "config": config, **base}

    def sources(self) -> dict[str, str]:
        """Size and time of each file, and the digest of a data set that is the base."""
        found = {}
        for role, paths in (("train", self.train), ("test", self.test)):
            for number, path in enumerate(paths):
                status = path.stat()
                found[f"{role}.{number}"] = f"{path} {status.st_size} {status.st_mtime_ns}"
        if self.base is not None and ModelReference.parse(self.base) is None:
            from dqrm.data.manifest import read_manifest

            found["base"] = read_manifest(Path(self.base)).digest
        return found

    def references(self, tracking: TrackingConfig) -> dict[str, str]:
        """The version of a model that is the base."""
        return {} if self.base is None else meaning("base", self.base, tracking)

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """Files or a base that are not there."""
        found = [
            Problem(role, f"{path}: no such file")
            for role, paths in (("train", self.train), ("test", self.test))
            for path in paths
            if not path.is_file()
        ]
        if self.base is not None and ModelReference.parse(self.base) is None:
            from dqrm.data.manifest import read_manifest

            try:
                read_manifest(Path(self.base))
            except ValueError as error:
                found.append(Problem("base", str(error)))
        return found

    def run(self, context: StageContext) -> dict[str, float]:
        """Prepare, or go on where a killed attempt was."""
        from dqrm.data.base import require_same_features
        from dqrm.data.manifest import MANIFEST_FILE, read_manifest
        from dqrm.data.prepare import Progress, prepare

        def show(progress: Progress) -> None:
            if (number := context.stop()) is not None:
                raise Interrupted(number)
            context.progress(progress.phase, progress.done, progress.total, progress.unit)

        work = context.scratch / DATA_FOLDER
        config = self.resolved()
        # A kill may have come between the end of the work and its move.
        if not (work / MANIFEST_FILE).is_file():
            base = None
            if (found := self._base(context)) is not None:
                base, schema, name = found
                require_same_features(config.resolved_schema, schema, name)
            prepare([*self.train, *self.test], work, config, base=base, progress=show)
        work.rename(context.output / DATA_FOLDER)
        manifest = read_manifest(context.output / DATA_FOLDER)
        context.tracker.set_tags({"dqrm.data.digest": manifest.digest})
        rows = {f"data/{n}_rows": float(info.num_rows) for n, info in manifest.splits.items()}
        new_ids = manifest.report.get("new_ids", {})
        return rows | {"data/new_ids": float(sum(new_ids.values()))}

    def _base(self, context: StageContext) -> "tuple[Base, Schema, str] | None":
        """The vocabularies to begin with, the columns they are of, and what they are called."""
        if self.base is None:
            return None
        grows = self.growth == "append"
        reference = ModelReference.parse(self.base)
        if reference is None:
            from dqrm.data.base import base_of

            base, manifest = base_of(self.base, grows=grows)
            return base, manifest.schema_, self.base
        version = context.references["base"]
        if version == NONE_YET:
            log.info("%s: no version yet; ids are counted anew", self.base)
            return None

        from dqrm.data.vocabulary import Base, save_keys
        from dqrm.serving.artifact import load_artifact
        from dqrm.tracking.registry import Registry

        name = reference.name
        folder = context.scratch / f"base-{version}"
        file = Registry.of(context.tracking).download_model(name, version, folder)
        artifact = load_artifact(file)
        for column in artifact.encoder.schema.categorical:
            if column.hash_buckets is None:
                keys = artifact.encoder.vocabularies[column.name]
                save_keys(folder / column.vocabulary_file, keys)
        base = Base(folder.resolve(), artifact.features_digest, grows)
        return base, artifact.encoder.schema, f"version {version} of {name}"


def meaning(field: str, text: str, tracking: TrackingConfig) -> dict[str, str]:
    """The version that ``text`` means now, by field; nothing where it names no model."""
    reference = ModelReference.parse(text)
    if reference is None:
        return {}
    from dqrm.tracking.registry import resolve

    return {field: resolve(reference, tracking) or NONE_YET}
