"""The packed model as an MLflow model: MLflow copies this file into every model it logs.

It is logged as code, not as a pickle. MLflow runs the copy when the model is loaded, so it needs
``dqrm`` installed, as the model's requirements say, and nothing else of the training environment.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dqrm.serving.predictor import Predictor


class ClickModel(PythonModel):
    """Click probabilities, float32 [rows], for a frame of raw rows."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the packed model that was logged with this file."""
        self._predictor = Predictor.load(context.artifacts["artifact"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the probability of a positive label for each row of ``model_input``."""
        return self._predictor.predict(model_input)


set_model(ClickModel())
