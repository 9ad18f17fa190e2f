"""Predictions for raw rows from a packed model."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from dqrm.serving.artifact import Artifact, load_artifact

ARTIFACT_FILE = "model.safetensors"
"""Name of the packed model in a run's artifact folder."""

ROWS_PER_BATCH = 8192
"""Rows predicted at a time, which bounds the memory of activations."""


class Predictor:
    """Turns a frame of raw rows into click probabilities.

    Args:
        artifact: a packed model with its encoder.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @classmethod
    def load(cls, path: str | Path) -> "Predictor":
        """Read a packed model file, or the artifact folder or run folder it lies in.

        Raises:
            ValueError: there is no packed model at ``path``.
        """
        return cls(load_artifact(find_artifact(Path(path))))

    @torch.inference_mode()
    def predict(self, frame: pd.DataFrame) -> npt.NDArray[np.float32]:
        """Return the probability of a positive label for each row, float32 [rows].

        Args:
            frame: the raw columns the data set was prepared from; a missing label column and
                unused columns are fine, values never seen in training count as unknown.
        """
        parts = []
        for begin in range(0, len(frame), ROWS_PER_BATCH):
            batch = self.artifact.encoder.encode(frame.iloc[begin : begin + ROWS_PER_BATCH])
            logits = self.artifact.model(batch.dense, batch.indices, batch.offsets)
            parts.append(torch.sigmoid(logits))
        return torch.cat(parts).numpy() if parts else np.empty(0, dtype=np.float32)


def find_artifact(path: Path) -> Path:
    """Return the packed model file at ``path``, in it, or in its artifact folder."""
    for candidate in (path, path / ARTIFACT_FILE, path / "artifact" / ARTIFACT_FILE):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path} holds no packed model ({ARTIFACT_FILE})")
