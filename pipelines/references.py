"""How a stage names a model: a folder, an installed package, or the model of an earlier stage."""

import importlib
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.pipelines.stage import MODEL_FOLDER, Product, Stage

if TYPE_CHECKING:
    from dqrm.compress.transforms.config import TransformConfig

_PACKAGE = "package:"
_STAGE = "stage:"
# By field; others take a transformer.
_TAKES: Mapping[str, Product] = {
    "allocation": "allocation",
    "candidate": "recommender",
    "data": "data set",
    "recommender": "recommender",
    "table_bits": "bits of tables",
}


def named_stage(reference: str) -> str | None:
    """The stage that ``stage:NAME`` names; None for any other model."""
    return reference.removeprefix(_STAGE) if reference.startswith(_STAGE) else None


def stages_named(earlier: Mapping[str, Stage], **references: str | None) -> tuple[str, ...]:
    """The stages among ``references``, given by field.

    Raises:
        ValueError: one of them is no earlier stage, or makes something else than the field takes;
            the message names the field.
    """
    named = []
    for field, reference in references.items():
        key = None if reference is None else named_stage(reference)
        if key is None:
            continue
        if key not in earlier:
            there = f"there are: {', '.join(earlier)}" if earlier else "it is the first one"
            raise ValueError(f"{field}={reference}: no earlier stage is called so; {there}")
        wanted = _TAKES.get(field, "transformer")
        if earlier[key].makes != wanted:
            fitting = [name for name, stage in earlier.items() if stage.makes == wanted]
            there = f"there are: {', '.join(fitting)}" if fitting else "there is none before it"
            kind = earlier[key].stage
            raise ValueError(f"{field}={reference}: a stage {kind} makes no {wanted}; {there}")
        named.append(key)
    return tuple(dict.fromkeys(named))


def outside_model(reference: str) -> Path | None:
    """Folder of a model from outside the pipeline; None for that of a stage.

    Args:
        reference: a folder, ``package:NAME`` or ``stage:NAME``. A package has a function
            ``get_model_path``, or is itself the folder.

    Raises:
        FileNotFoundError: there is no such folder or package.
        ValueError: the folder holds no model.
    """
    if named_stage(reference) is not None:
        return None
    folder = _package_folder(reference) if reference.startswith(_PACKAGE) else Path(reference)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no model, as it has no config.json")
    return folder


def model_folder(reference: str, inputs: Mapping[str, Path]) -> Path:
    """Folder of any model; ``inputs`` are the output folders of stages, by name."""
    key = named_stage(reference)
    if key is not None:
        return inputs[key] / MODEL_FOLDER
    folder = outside_model(reference)
    assert folder is not None
    return folder


def skeleton_of(reference: str, earlier: Mapping[str, Stage]) -> Any:
    """The transformer that ``reference`` names, without values; None where it is not known.

    Args:
        reference: a folder, ``package:NAME`` or ``stage:NAME``.
        earlier: the stages before the one that says so, by name.

    Raises:
        OSError: there is no such folder or package.
        ValueError: the folder holds no model that transformers knows.
    """
    from dqrm.pipelines.text.classifier import load_skeleton

    key = named_stage(reference)
    if key is not None:
        if key not in earlier:
            return None
        try:
            return earlier[key].skeleton(_before(key, earlier))
        except (OSError, ValueError):
            # A problem of that stage, which tells it.
            return None
    folder = outside_model(reference)
    assert folder is not None
    return load_skeleton(folder)


def names_of(reference: str, earlier: Mapping[str, Stage]) -> Any:
    """A transformer without values that has the module names of the one ``reference`` names.

    Pruning decides on widths only when it runs, and names stay; so this is the model before. None
    where it is not known.

    Args:
        reference: a folder, ``package:NAME`` or ``stage:NAME``.
        earlier: the stages before the one that says so, by name.

    Raises:
        OSError: there is no such folder or package.
        ValueError: the folder holds no model that transformers knows.
    """
    known = skeleton_of(reference, earlier)
    key = named_stage(reference)
    if known is not None or key is None or key not in earlier:
        return known
    before = getattr(earlier[key], "model", None)
    try:
        return None if before is None else names_of(before, _before(key, earlier))
    except (OSError, ValueError):
        # A problem of that stage, which tells it.
        return None


def compression_of(
    reference: str, earlier: Mapping[str, Stage]
) -> "tuple[TransformConfig, ...] | None":
    """The transforms that the weights ``reference`` names have been through.

    None where they are not known yet, or no longer, as those of a folder with records.

    Args:
        reference: a folder, ``package:NAME`` or ``stage:NAME``.
        earlier: the stages before the one that says so, by name.
    """
    from dqrm.compress.grids.records_file import read_records

    key = named_stage(reference)
    if key is not None:
        return earlier[key].compression(_before(key, earlier)) if key in earlier else None
    folder = outside_model(reference)
    assert folder is not None
    return None if read_records(folder) else ()


def origin_folder(reference: str, earlier: Mapping[str, Stage]) -> Path | None:
    """Folder of the model from outside that ``reference`` goes back to, if there is one."""
    key = named_stage(reference)
    if key is None:
        return outside_model(reference)
    its_model = getattr(earlier.get(key), "model", None)
    return None if its_model is None else origin_folder(its_model, _before(key, earlier))


def _before(key: str, earlier: Mapping[str, Stage]) -> dict[str, Stage]:
    names = list(earlier)
    return {name: earlier[name] for name in names[: names.index(key)]}


def _package_folder(reference: str) -> Path:
    name = reference.removeprefix(_PACKAGE).replace("-", "_")
    found = util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin is None:
        hint = f"pip install {name.replace('_', '-')}"
        raise FileNotFoundError(f"{reference}: no such package is installed; {hint}")
    get_model_path = getattr(importlib.import_module(name), "get_model_path", None)
    return Path(found.origin).parent if get_model_path is None else Path(get_model_path())
