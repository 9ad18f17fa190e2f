"""The built-in data of studies: clicks of a teacher, generated when they are first needed."""

from collections.abc import Callable
from pathlib import Path

from dqrm.data.synth import SynthConfig, synthesize

BAG_COLUMNS = ("C3", "C4", "C12", "C16", "C21", "C24")
"""Columns with lists of ids in studies of bags: the six largest tables."""


def teacher_data(
    output: Path,
    scale: float,
    progress: Callable[[str, int, int, str], None],
    max_bag: int | None = None,
) -> Path:
    """Return the folder of a teacher's data set.

    Args:
        output: folder of all studies.
        scale: of tables and rows, beside Criteo Kaggle.
        progress: told how far the generation is.
        max_bag: longest list of the columns that hold lists; None has one id everywhere.
    """
    name = f"teacher-{scale:g}" + ("" if max_bag is None else f"-bags{max_bag}")
    folder = output / "data" / name
    if not (folder / "dataset.json").is_file():
        config = SynthConfig(scale=scale)
        if max_bag is not None:
            config = SynthConfig(scale=scale, multi_hot=BAG_COLUMNS, max_bag=max_bag)
        synthesize(folder, config, progress=lambda at, rows: progress(name, at, rows, "rows"))
    return folder
