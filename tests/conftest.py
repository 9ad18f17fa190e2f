"""Real data sets, prepared once a session, that tests train on."""

import os

# Workers of a parallel run share the cores; one thread each keeps them from waiting on each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"

import numpy as np
import pandas as pd
import pytest


def clicks(rows: int, seed: int = 0) -> pd.DataFrame:
    """Rows with a label that depends on two columns, one multi-hot column, and missing values."""
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.5, rows) % 200
    item = rng.zipf(1.3, rows) % 300
    tags = [[f"t{t}" for t in rng.integers(0, 20, n)] for n in rng.integers(0, 4, rows)]
    taste = np.random.default_rng(99).normal(size=(300, 2))
    logit = 1.5 * taste[user % 300, 0] + 1.5 * taste[item, 1] - 1
    return pd.DataFrame(
        {
            "clicked": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
            "price": np.where(rng.random(rows) < 0.1, np.nan, rng.lognormal(2, 1, rows)),
            "age": rng.integers(-1, 80, rows),
            "user": [f"u{u}" for u in user],
            "item": item,
            "tags": tags,
        }
    )


@pytest.fixture(scope="session")
def clicks_frame() -> pd.DataFrame:
    """6,000 rows; columns clicked, price, age, user, item, tags."""
    return clicks(6000)


@pytest.fixture(scope="session")
def clicks_data(clicks_frame, tmp_path_factory):
    """The folder of the same rows, prepared."""
    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "clicks"
    config = PrepareConfig.model_validate(
        {
            "schema": {
                "label": "clicked",
                "dense": ["price", "age"],
                "categorical": ["user", "item", {"name": "tags", "multi_hot": True}],
            },
            "format": "parquet",
            "min_frequency": 2,
            "workers": 1,
        }
    )
    prepare(clicks_frame, folder, config)
    return folder


def pytest_sessionstart() -> None:
    """Where the compiled kernels are promised, do not let their tests skip for want of them."""
    from dqrm.kernels.cpu import native_available, unavailable_reason

    if os.environ.get("DQRM_REQUIRE_KERNELS") == "1" and not native_available():
        raise pytest.UsageError(f"the compiled kernels are missing: {unavailable_reason()}")
