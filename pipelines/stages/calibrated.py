"""What stages that compress a fine-tuned text model without training it share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveInt

from dqrm.pipelines.references import compression_of, model_folder, outside_model
from dqrm.pipelines.stage import Interrupted, Problem, Stage, StageContext
from dqrm.pipelines.stages.text_model import TextModelStage, head_problems

if TYPE_CHECKING:
    from dqrm.pipelines.text.labelled import LabelledText
    from dqrm.pipelines.text.tables import Examples, Labels


class CalibratedStage(TextModelStage):
    """Compress a sequence classifier or regressor by looking at some training rows."""

    takes_patterns: ClassVar[bool] = False
    """Whether weights may have N:M patterns already, which they keep, and inputs grids."""

    samples: PositiveInt = 1024
    """Training rows to look at."""

    batch_size: PositiveInt = 32
    """Sentences at a time."""

    seed: int = 0
    """Of which rows are taken, and of their order."""

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What every stage with a text model finds, and a model that is compressed already."""
        found = super().problems(earlier) or head_problems("model", self.model)
        if found:
            return found
        from dqrm.compress.grids.records_file import read_records
        from dqrm.compress.transforms.config import QuantTransform

        folder = outside_model(self.model)
        try:
            if folder is None:
                done = compression_of(self.model, earlier) or ()
                on_grids = [isinstance(t, QuantTransform) and t.weight is not None for t in done]
            else:
                on_grids = [record.grid != "fp32" for record in read_records(folder).values()]
        except (OSError, ValueError) as error:
            return [Problem("model", str(error))]
        reason = self._too_late(on_grids)
        return [] if reason is None else [Problem("model", reason)]

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows."""
        train, dev, _ = self.data.read()
        return [
            ("calibration rows", f"{min(self.samples, len(train)):,} of {len(train):,}"),
            ("dev rows", f"{len(dev):,}"),
        ]

    def load(self, context: StageContext) -> "FinetunedText":
        """Read the model and the rows.

        Raises:
            ValueError: the model was not fine-tuned on such rows, or is compressed in a way that
                this would undo.
        """
        from dqrm.compress.grids.records_file import read_records
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import load_teacher, load_tokenizer, order_labels
        from dqrm.pipelines.text.labelled import LabelledText
        from dqrm.pipelines.text.positions import check_length
        from dqrm.pipelines.text.tables import Labels

        folder = model_folder(self.model, context.inputs)
        reason = self._too_late([r.grid != "fp32" for r in read_records(folder).values()])
        if reason is not None:
            raise ValueError(reason)
        train, dev, test = self.data.read()
        labels = order_labels(Labels.of(train.labels, self.task, str(self.data.train)), folder)
        tokenizer = load_tokenizer(folder)

        def encoded(examples: "Examples", where: object) -> LabelledText:
            text = EncodedText(tokenizer, examples, self.max_length)
            return LabelledText(text, labels.encode(examples.labels, str(where)))

        splits = {"best/val_": encoded(dev, self.data.dev or self.data.train)}
        if test is not None:
            splits["test/"] = encoded(test, self.data.test or self.data.train)
        model = load_teacher(folder, labels).eval()
        check_length(model, self.max_length)
        return FinetunedText(
            model,
            tokenizer,
            labels,
            train,
            lambda examples: encoded(examples, self.data.train),
            splits,
        )

    def _too_late(self, on_grids: Sequence[bool]) -> str | None:
        """Why the model cannot be compressed so any more, if it cannot.

        Args:
            on_grids: of all that was done to its weights before, whether it put them on grids.
        """
        if any(on_grids):
            what = "its weights are on grids already"
        elif on_grids and not self.takes_patterns:
            what = "it has N:M patterns or inputs on grids already"
        else:
            return None
        return f"{self.model}: {what}; {self.stage} comes before that, name the model from then"

    def check(self, context: StageContext) -> None:
        """Raise Interrupted where a signal asked to end."""
        number = context.stop()
        if number is not None:
            raise Interrupted(number)


@dataclass(frozen=True)
class FinetunedText:
    """A model and the rows it can be looked at with."""

    model: Any
    """Of transformers, in evaluation mode."""
    tokenizer: Any
    labels: "Labels"
    train: "Examples"
    encode: "Callable[[Examples], LabelledText]"
    splits: "dict[str, LabelledText]"
    """Rows that quality is measured on, by what the names of the metrics begin with."""

    def quality(self, model: Any, batch_size: int) -> dict[str, float]:
        """Metrics of ``model`` on the splits, and its size."""
        from dqrm.pipelines.text.classifier import predict_text
        from dqrm.pipelines.text.quality import measure_text

        classes = None if self.labels.classes is None else self.labels.num_outputs
        metrics: dict[str, float] = {}
        for prefix, rows in self.splits.items():
            logits = predict_text(model, rows.text, batch_size)
            measured = measure_text(logits, rows.labels, classes)
            metrics |= {f"{prefix}{name}": value for name, value in measured.items()}
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return metrics | {
            "size/parameters": float(parameters),
            "size/fp32_bytes": 4.0 * parameters,
        }
