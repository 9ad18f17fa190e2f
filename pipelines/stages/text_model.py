"""What all stages that take a text model and its rows share."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import PositiveInt

from dqrm.compress.transforms.config import QuantTransform, TransformConfig, patterns
from dqrm.pipelines.digests import folder_digest
from dqrm.pipelines.references import names_of, outside_model, skeleton_of, stages_named
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

    max_length: PositiveInt = 128
    """Tokens after which a sentence, or a pair, is cut."""

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stage whose model it takes, if any."""
        return stages_named(earlier, model=self.model)

    def sources(self) -> dict[str, str]:
        """Digests of the tables, and of a model from outside."""
        digests = self.data.digests()
        folder = outside_model(self.model)
        return digests if folder is None else {**digests, "model": folder_digest(folder)}

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A missing package, model, tokenizer, file or column, and sentences too long for it."""
        from dqrm.pipelines.text.library import missing_reason

        reason = missing_reason()
        if reason is not None:
            found = [Problem("stage", reason)]
        else:
            found = model_problems("model", self.model)
            found = found or length_problems(self.model, earlier, self.max_length)
        return [*found, *self.data.problems()]


def length_problems(reference: str, earlier: Mapping[str, Stage], max_length: int) -> list[Problem]:
    """What is wrong with ``max_length`` for a model, as far as that is known.

    Args:
        reference: a folder, package:NAME or stage:NAME, without problems of its own.
        earlier: the stages before the one that says so, by name.
        max_length: tokens after which a sentence is cut.
    """
    from dqrm.pipelines.text.positions import check_length

    model = skeleton_of(reference, earlier)
    try:
        if model is not None:
            check_length(model, max_length)
    except ValueError as error:
        return [Problem("max_length", str(error))]
    return []


def model_problems(
    field: str, reference: str, *, takes_text: bool = True, packed: bool = False
) -> list[Problem]:
    """What is wrong with a model from outside.

    Args:
        field: that names the model, for the problem.
        reference: a folder, package:NAME, or stage:NAME, whose problems are that stage's.
        takes_text: whether its tokenizer is used.
        packed: whether it may be packed, as that of a teacher, which is not trained.
    """
    from dqrm.pipelines.text.classifier import load_skeleton, load_tokenizer, read_config

    try:
        folder = outside_model(reference)
        if folder is not None:
            load_skeleton(folder)
            how = getattr(read_config(folder), "quantization_config", None)
            if how is not None and not packed:
                method = how.get("quant_method", "by no named method")
                text = f"{folder}: its weights are packed ({method}); name the model from before"
                return [Problem(field, text)]
            if takes_text:
                load_tokenizer(folder)
    except (OSError, ValueError) as error:
        return [Problem(field, str(error))]
    return []


def head_problems(field: str, reference: str) -> list[Problem]:
    """Where a model from outside was never fine-tuned, that it tells no classes.

    Args:
        field: that names the model, for the problem.
        reference: a folder, package:NAME or stage:NAME, without other problems.
    """
    from dqrm.pipelines.text.classifier import read_config, require_head

    folder = outside_model(reference)
    if folder is None:
        return []
    try:
        require_head(read_config(folder), str(folder))
    except ValueError as error:
        return [Problem(field, str(error))]
    return []


def name_problems(
    reference: str, earlier: Mapping[str, Stage], transforms: Sequence[TransformConfig]
) -> list[Problem]:
    """Patterns of transforms that match nothing in a model, or in the one it was cut from.

    Args:
        reference: a folder, package:NAME or stage:NAME, without problems of its own.
        earlier: the stages before the one that says so, by name.
        transforms: whose ``match`` is looked at.
    """
    from torch import nn

    from dqrm.compress.transforms.base import matching_modules

    model = names_of(reference, earlier)
    if model is None:
        return []
    for transform in transforms:
        weights = isinstance(transform, QuantTransform) and transform.act is None
        kinds = (nn.Linear, nn.Embedding) if weights else (nn.Linear,)
        try:
            matching_modules(model, patterns(transform.match), kinds)
        except ValueError as error:
            return [Problem("transforms", str(error))]
    return []
