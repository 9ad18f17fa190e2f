"""What all stages that take a text model and its rows share."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from dqrm.pipelines.digests import folder_digest
from dqrm.pipelines.references import outside_model, skeleton_of, stages_named
from dqrm.pipelines.stage import Problem, Product, Stage
from dqrm.pipelines.stages.text_data import TextData


class TextModelStage(Stage):
    """Do something to a sequence classifier or regressor."""

    makes: ClassVar[Product] = "transformer"

    model: str
    """Folder in Hugging Face's format, package:NAME (installed), or stage:NAME (an earlier one)."""

    data: TextData

    task: Literal["auto", "classification", "regression"] = "auto"
    """auto: a regression where labels are fractions."""

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stage whose model it takes, if any."""
        return stages_named(earlier, model=self.model)

    def sources(self) -> dict[str, str]:
        """Digests of the tables, and of a model from outside."""
        digests = self.data.digests()
        folder = outside_model(self.model)
        return digests if folder is None else {**digests, "model": folder_digest(folder)}

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A missing package, model, tokenizer, file or column."""
        from dqrm.pipelines.text.library import missing_reason

        reason = missing_reason()
        found = (
            model_problems("model", self.model) if reason is None else [Problem("stage", reason)]
        )
        return [*found, *self.data.problems()]


def model_problems(field: str, reference: str, *, takes_text: bool = True) -> list[Problem]:
    """What is wrong with a model from outside.

    Args:
        field: that names the model, for the problem.
        reference: a folder, package:NAME, or stage:NAME, whose problems are that stage's.
        takes_text: whether its tokenizer is used.
    """
    from dqrm.pipelines.text.classifier import load_skeleton, load_tokenizer

    try:
        folder = outside_model(reference)
        if folder is not None:
            load_skeleton(folder)
            if takes_text:
                load_tokenizer(folder)
    except (OSError, ValueError) as error:
        return [Problem(field, str(error))]
    return []
