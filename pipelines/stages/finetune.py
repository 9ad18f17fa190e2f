"""``stage: finetune``: a Hugging Face sequence classifier or regressor, trained on sentences.

Its output holds ``model/``, the model selected on the dev rows with its tokenizer, weights in
safetensors. A killed stage goes on from its last state and comes to the same weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dqrm.pipelines.digests import file_digest, folder_digest
from dqrm.pipelines.references import model_folder, outside_model, stages_named
from dqrm.pipelines.stage import MODEL_FOLDER, Problem, Stage, StageContext
from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.pipelines.text.finetune import Recipe
    from dqrm.pipelines.text.tables import Examples

_ROWS_CHECKED = 200


class TextData(Settings):
    """Labelled sentences, or pairs of them."""

    train: Path
    """TSV, CSV or Parquet with a header; text may be packed (.gz)."""

    dev: Path | None = None
    """What to select on; without it, some of the training rows."""

    dev_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training rows to select on where dev is not given; the same ones for every
    seed."""

    test: Path | None = None
    """Measured once, with the selected model."""

    text: str | None = None
    """Column of the sentence; found by the names of GLUE's tasks when not given."""

    text_pair: str | None = None
    """Column of the second sentence, of pairs."""

    label: str | None = None
    """Column of the class or the score; label or score when not given."""

    format: Literal["auto", "tsv", "csv", "parquet"] = "auto"
    """auto goes by the name of the file. Quotes of TSV are literal, as GLUE writes them."""

    def files(self) -> dict[str, Path]:
        """The files, by field."""
        given = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: path for name, path in given.items() if path is not None}


class FinetuneStage(Stage):
    """Fine-tune a sequence classifier or regressor."""

    stage: Literal["finetune"] = "finetune"
    """Fine-tune a Hugging Face sequence classifier or regressor."""

    model: str
    """Folder in Hugging Face's format, package:NAME (installed), or stage:NAME (an earlier one)."""

    data: TextData

    task: Literal["auto", "classification", "regression"] = "auto"
    """auto: a regression where labels are fractions."""

    select_by: Literal["auto", "accuracy", "matthews", "f1", "pearson", "spearman"] = "auto"
    """Dev metric of the model that is kept; auto: accuracy, or pearson of a regression."""

    epochs: PositiveInt = 3
    """Passes over the training rows."""

    max_steps: PositiveInt | None = None
    """Stop after so many steps."""

    batch_size: PositiveInt = 32
    """Sentences a step, about as long as each other."""

    max_length: PositiveInt = 128
    """Tokens after which a sentence, or a pair, is cut."""

    lr: PositiveFloat = 5e-5
    """Learning rate of AdamW at the end of the warm-up; it then falls to 0 in a line."""

    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises."""

    weight_decay: NonNegativeFloat = 0.01
    """Of matrices; biases and norms have none."""

    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are scaled down to it."""

    freeze_embeddings: bool = False
    """Leave the word embeddings as they are: less to update, most of a small model."""

    eval_every: PositiveInt | None = None
    """Steps between selections, besides the end of every epoch."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the CPU multiplies it in hardware. Weights and updates stay FP32."""

    seed: int = 0
    """Of the new head, the order of rows and dropout."""

    save_minutes: PositiveFloat = 5.0
    """Minutes between states that a killed stage goes on from."""

    def identity(self) -> dict[str, Any]:
        """All but how often it saves, which changes nothing."""
        settings = super().identity()
        del settings["save_minutes"]
        return settings

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stage whose model it takes, if any."""
        return stages_named(earlier, model=self.model)

    def sources(self) -> dict[str, str]:
        """Digests of the tables, and of a model from outside."""
        digests = {name: file_digest(path) for name, path in self.data.files().items()}
        folder = outside_model(self.model)
        return digests if folder is None else {**digests, "model": folder_digest(folder)}

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A missing package, model, file or column."""
        from dqrm.pipelines.text.library import missing_reason
        from dqrm.pipelines.text.tables import find_columns, read_table

        found = []
        reason = missing_reason()
        if reason is not None:
            found.append(Problem("stage", reason))
        try:
            outside_model(self.model)
        except (OSError, ValueError) as error:
            found.append(Problem("model", str(error)))
        data = self.data
        for name, path in data.files().items():
            if not path.is_file():
                found.append(Problem(f"data.{name}", f"{path}: no such file"))
                continue
            try:
                frame = read_table(path, data.format, _ROWS_CHECKED)
                find_columns(frame, str(path), data.text, data.text_pair, data.label)
            except (OSError, ValueError) as error:
                found.append(Problem(f"data.{name}", str(error)))
        return found

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, steps and the size of the model."""
        from dqrm.pipelines.text.classifier import count_parameters
        from dqrm.pipelines.text.finetune import count_steps

        train, dev, _ = self._tables()
        recipe = self._recipe(self.select_by)
        rows = [
            ("training rows", f"{len(train):,}"),
            ("dev rows", f"{len(dev):,}"),
            ("steps", f"{count_steps(len(train), recipe):,}"),
            ("precision", "bf16" if recipe.bf16 else "fp32"),
        ]
        folder = outside_model(self.model)
        parameters = None if folder is None else count_parameters(folder)
        if parameters is not None:
            rows += [("parameters", f"{parameters:,}"), ("bytes", f"{4 * parameters:,} in FP32")]
        return rows

    def run(self, context: StageContext) -> dict[str, float]:
        """Train, select, test once, and write the model."""
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import (
            load_classifier,
            load_tokenizer,
            predict_text,
            save_classifier,
        )
        from dqrm.pipelines.text.finetune import FineTuner, LabelledText
        from dqrm.pipelines.text.quality import measure_text
        from dqrm.pipelines.text.tables import Labels

        folder = model_folder(self.model, context.inputs)
        train, dev, test = self._tables()
        labels = Labels.of(train.labels, self.task, str(self.data.train))
        tokenizer = load_tokenizer(folder)
        model = load_classifier(folder, labels, self.seed)

        def encoded(examples: "Examples", where: Path | None) -> LabelledText:
            text = EncodedText(tokenizer, examples, self.max_length)
            return LabelledText(text, labels.encode(examples.labels, str(where)))

        recipe = self._recipe(self._selection(labels.num_outputs, labels.classes is None))
        tuner = FineTuner(
            model,
            encoded(train, self.data.train),
            encoded(dev, self.data.dev or self.data.train),
            recipe,
            context.scratch,
            context.tracker,
            context.stop,
            context.progress,
        )
        best = tuner.fit()
        state = tuner.state
        parameters = sum(parameter.numel() for parameter in model.parameters())
        metrics = {
            **{f"best/val_{name}": value for name, value in best.items()},
            "best/step": float(state.best_step or state.step),
            "size/parameters": float(parameters),
            "size/fp32_bytes": 4.0 * parameters,
            "perf/samples_per_second": state.samples / state.seconds,
        }
        if test is not None:
            rows = encoded(test, self.data.test)
            logits = predict_text(model, rows.text, 2 * self.batch_size, bf16=recipe.bf16)
            classes = None if labels.classes is None else labels.num_outputs
            measured = measure_text(logits, rows.labels, classes)
            metrics |= {f"test/{name}": value for name, value in measured.items()}
        save_classifier(model, tokenizer, context.output / MODEL_FOLDER)
        return metrics

    def _recipe(self, select_by: str) -> "Recipe":
        from dqrm.pipelines.text.classifier import bf16_is_fast
        from dqrm.pipelines.text.finetune import Recipe

        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            max_steps=self.max_steps,
            eval_every=self.eval_every,
            freeze_embeddings=self.freeze_embeddings,
            bf16=bf16_is_fast() if self.precision == "auto" else self.precision == "bf16",
            seed=self.seed,
            select_by=select_by,
            save_seconds=60 * self.save_minutes,
        )

    def _selection(self, outputs: int, regression: bool) -> str:
        """The metric to select by. Raises ValueError for one that the task does not have."""
        if self.select_by == "auto":
            return "pearson" if regression else "accuracy"
        fits = ["pearson", "spearman"] if regression else ["accuracy", "matthews"]
        if not regression and outputs == 2:
            fits.append("f1")
        if self.select_by not in fits:
            kind = "a regression" if regression else f"{outputs} classes"
            raise ValueError(f"select_by={self.select_by}: {kind} can take {', '.join(fits)}")
        return self.select_by

    def _tables(self) -> "tuple[Examples, Examples, Examples | None]":
        """The rows to train on, to select on and to test on."""
        from dqrm.pipelines.text.tables import (
            find_columns,
            read_table,
            split_examples,
            take_examples,
        )

        data = self.data
        taken = {}
        for name, path in data.files().items():
            frame = read_table(path, data.format)
            columns = find_columns(frame, str(path), data.text, data.text_pair, data.label)
            taken[name] = take_examples(frame, columns, str(path))
        train = taken["train"]
        if "dev" not in taken:
            train, taken["dev"] = split_examples(train, data.dev_fraction, str(data.train))
        return train, taken["dev"], taken.get("test")
