"""New rows prepared with the vocabularies of an existing data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from dqrm.data.config import PrepareConfig
from dqrm.data.manifest import VOCABULARY_FOLDER, Manifest, read_manifest
from dqrm.data.preparation import Progress
from dqrm.data.prepare import PrepareReport, run

if TYPE_CHECKING:
    import pandas as pd


def apply(
    dataset: Path | str,
    sources: "Sequence[Path | str] | pd.DataFrame",
    output: Path | str,
    *,
    split: Literal["train", "validation", "test"] = "test",
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PrepareReport:
    """Prepare `sources` into folder `output` with the columns and vocabularies of `dataset`.

    All rows go to one split. A model trained on `dataset` reads the result: its features_digest
    is the same. Values that `dataset` did not see in training get id 0; the report says how many.

    changes: settings of `PrepareConfig` that differ from those `dataset` was prepared with, such
        as format or workers.

    Raises:
        ValueError: as `prepare`; or `changes` would change the columns or the vocabularies.
    """
    folder = Path(dataset)
    manifest = read_manifest(folder)
    if Path(output).resolve() == folder.resolve():
        raise ValueError(f"{output}: is the data set itself; name another folder")
    config = _config(manifest, changes or {})
    return run(
        sources,
        output,
        config,
        split,
        (folder / VOCABULARY_FOLDER).resolve(),
        overwrite=overwrite,
        progress=progress,
    )


_FIXED = {"schema", "schema_", "split", "hash_buckets", "min_frequency", "max_size"}


def _config(manifest: Manifest, changes: Mapping[str, Any]) -> PrepareConfig:
    """How the data set was prepared, with changes; the schema is already resolved."""
    for name in changes:
        if name in _FIXED:
            raise ValueError(f"{name}: the data set decides it; prepare the rows anew instead")
    known = {
        name: value
        for name, value in manifest.settings.items()
        if name in PrepareConfig.model_fields and name not in _FIXED
    }
    if changes.get("format", known.get("format")) != known.get("format"):
        # What was said about another format's text does not carry over.
        for name in ("header", "columns", "delimiter", "quote"):
            known.pop(name, None)
    # The split needs no time column, and new rows may have none.
    schema = manifest.schema_.model_copy(update={"time": None})
    try:
        return PrepareConfig.model_validate({**known, **changes, "schema": schema})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field or 'settings'}: {first['msg']}") from None
