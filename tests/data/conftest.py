"""Raw rows for the tests of preparation: made up, in the layout of the Criteo logs."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

CriteoText = Callable[[int, int], bytes]


def criteo_rows(rows: int, seed: int) -> bytes:
    """Lines with a label, 13 integers and 26 hexadecimal values, some of them empty."""
    rng = np.random.default_rng(seed)
    label = (rng.random(rows) < 0.25).astype(int).astype(str)
    columns = [label]
    for _ in range(13):
        values = (rng.lognormal(2, 2, rows).astype(np.int64) - 2).astype(str)
        columns.append(np.where(rng.random(rows) < 0.2, "", values))
    for column in range(26):
        values = rng.zipf(1.2, rows) % (10 + 200 * column) * 2654435761 % 2**32
        texts = np.array([f"{value:08x}" for value in values])
        columns.append(np.where(rng.random(rows) < 0.1, "", texts))
    return "".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)).encode()


@pytest.fixture(scope="session")
def criteo_text() -> CriteoText:
    """Function of (rows, seed): that many lines in Criteo's layout."""
    return criteo_rows


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Function: every file under a folder and its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture
def split_table() -> Callable[[Path, str], pa.Table]:
    """Function: the rows of one split of a prepared data set, in order."""

    def read(folder: Path, split: str) -> pa.Table:
        files = sorted((folder / split).glob("*.arrow"))
        return pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files])

    return read


@pytest.fixture(scope="session")
def shared_ctr() -> Path:
    """Folder of the Criteo samples, which are not part of the repository."""
    root = os.environ.get("DQRM_SHARED_DATA")
    folder = Path(root) if root else Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "ctr").is_dir():
        pytest.skip(f"no Criteo sample in {folder}; set DQRM_SHARED_DATA to its folder")
    return folder / "ctr"
