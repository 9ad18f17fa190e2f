"""``stage: finetune``: a Hugging Face sequence classifier or regressor, trained on sentences.

Its output holds ``model/``, the model selected on the dev rows with its tokenizer, weights in
safetensors. A killed stage goes on from its last state and comes to the same weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dqrm.pipelines.stages.text_training import TextTrainingStage

if TYPE_CHECKING:
    from dqrm.pipelines.text.finetune import Recipe, Training
    from dqrm.pipelines.text.tables import Labels


class FinetuneStage(TextTrainingStage):
    """Fine-tune a sequence classifier or regressor."""

    stage: Literal["finetune"] = "finetune"
    """Fine-tune a Hugging Face sequence classifier or regressor."""

    def prepare(
        self,
        model: Any,
        teacher: Any,
        labels: "Labels",
        recipe: "Recipe",
        inputs: Mapping[str, Path],
    ) -> "Training":
        """The loss of the labels, and no compression."""
        from dqrm.compress.transforms.base import Compression
        from dqrm.pipelines.text.finetune import Training
        from dqrm.pipelines.text.objective import TaskLoss

        objective = TaskLoss(regression=labels.classes is None, bf16=recipe.bf16)
        return Training(objective, Compression([]))
