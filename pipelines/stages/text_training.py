"""What stages that train a text model share: settings, rows, and the run itself."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dqrm.pipelines.references import (
    model_folder,
    named_stage,
    origin_folder,
    outside_model,
    skeleton_of,
)
from dqrm.pipelines.stage import MODEL_FOLDER, Problem, Stage, StageContext
from dqrm.pipelines.stages.text_checks import look_at_rows, weight_problems
from dqrm.pipelines.stages.text_exchange import MEETING, TextExchange
from dqrm.pipelines.stages.text_model import TextModelStage

if TYPE_CHECKING:
    from dqrm.pipelines.text.finetune import Recipe, Training
    from dqrm.pipelines.text.tables import Examples, Labels
    from dqrm.training.world import World

log = logging.getLogger(__name__)


def _is_default(exchange: Any) -> bool:
    return bool(exchange == TextExchange())


class TextTrainingStage(TextModelStage):
    """Train a sequence classifier or regressor."""

    select_by: Literal["auto", "accuracy", "matthews", "f1", "pearson", "spearman"] = "auto"
    """Dev metric of the model that is kept; auto: accuracy, or pearson of a regression."""

    epochs: PositiveInt = 3
    """Passes over the training rows."""

    max_steps: PositiveInt | None = None
    """Stop after so many steps."""

    batch_size: PositiveInt = 32
    """Sentences a step, about as long as each other."""

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
    """auto: bf16 where the CPU multiplies it faster. Weights and updates stay FP32."""

    seed: int = 0
    """Of the new head, the order of rows and dropout."""

    save_minutes: PositiveFloat = 5.0
    """Minutes between states that a killed stage goes on from."""

    exchange: TextExchange = Field(default=TextExchange(), exclude_if=_is_default)
    """What several processes send each other."""

    def identity(self) -> dict[str, Any]:
        """All but how often it saves and how processes meet, which change nothing."""
        settings = super().identity()
        del settings["save_minutes"]
        # A stage that was complete before there was this setting stays so.
        codecs = {k: v for k, v in settings.pop("exchange", {}).items() if k not in MEETING}
        if codecs and codecs != TextExchange().model_dump(mode="json", exclude=set(MEETING)):
            settings["exchange"] = codecs
        return settings

    @property
    def trains_together(self) -> bool:
        """Every process takes its share of the batches."""
        return True

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """What every text stage finds, weights that lack values, and labels not to be learned."""
        found = super().problems(earlier)
        if not any(problem.field in ("stage", "model") for problem in found):
            found += weight_problems("model", self.model, new_head=True)
        if any(problem.field.startswith("data") for problem in found):
            return found
        seen = look_at_rows(self.data, self.task)
        found += seen.problems
        try:
            if seen.labels is not None:
                self._selection(seen.labels)
        except ValueError as error:
            found.append(Problem("select_by", str(error)))
        return found

    def labels(self, earlier: Mapping[str, Stage]) -> "Labels | None":
        """What its model learns to say, in the order of its outputs; None while not known."""
        from dqrm.pipelines.text.classifier import order_as

        labels, config = look_at_rows(self.data, self.task).labels, head_of(self.model, earlier)
        return labels if labels is None or config is None else order_as(labels, config)

    def skeleton(self, earlier: Mapping[str, Stage]) -> Any:
        """That of the model it takes."""
        return skeleton_of(self.model, earlier)

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, task, steps, the size of the model and how long it takes."""
        from dqrm.pipelines.text.estimate import training_seconds
        from dqrm.pipelines.text.finetune import count_steps

        train, dev, _ = self.data.read()
        recipe = self.recipe(self.select_by)
        steps = count_steps(len(train), recipe)
        rows = [
            ("training rows", f"{len(train):,}"),
            ("dev rows", f"{len(dev):,}"),
            ("task", str(self.labels(earlier))),
            ("steps", f"{steps:,}"),
            ("precision", "bf16" if recipe.bf16 else "fp32"),
        ]
        skeleton = self.skeleton(earlier)
        if skeleton is not None:
            parameters = sum(parameter.numel() for parameter in skeleton.parameters())
            rows += [("parameters", f"{parameters:,}"), ("bytes", f"{4 * parameters:,} in FP32")]
            rows += self.sizes(skeleton)
        per_step = self._step_seconds(earlier, train, recipe, steps)
        if per_step is not None:
            minutes = training_seconds(per_step, steps, len(dev), recipe) / 60
            note = f"from steps of {per_step:.2f} s, taken now with random weights"
            rows.append(("estimated time", f"{minutes:,.1f} minutes, {note}"))
        return rows

    def _step_seconds(
        self,
        earlier: Mapping[str, Stage],
        train: "Examples",
        recipe: "Recipe",
        steps: int,
    ) -> float | None:
        """Seconds of a step here; None where the model is not known yet."""
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import load_tokenizer
        from dqrm.pipelines.text.estimate import make_random, sample_rows, step_seconds
        from dqrm.pipelines.text.labelled import LabelledText
        from dqrm.pipelines.text.tables import Labels

        origin = origin_folder(self.model, earlier)
        taken = skeleton_of(self.model, earlier)
        if origin is None or taken is None:
            return None
        labels = Labels.of(train.labels, self.task, str(self.data.train))
        taken.config.num_labels = labels.num_outputs
        model = make_random(taken)
        teacher = None if self.teacher is None else skeleton_of(self.teacher, earlier)
        if teacher is not None:
            teacher.config.num_labels = labels.num_outputs
            teacher = make_random(teacher)
        elif self.teacher is not None:
            return None
        self._choose_attention(recipe, model, teacher)
        training = self.prepare(model, teacher, labels, recipe, {})
        examples = train.take(sample_rows(len(train), recipe))
        text = EncodedText(load_tokenizer(origin), examples, self.max_length)
        sample = LabelledText(text, labels.encode(examples.labels, str(self.data.train)))
        return step_seconds(model, training, recipe, sample, steps)

    def run(self, context: StageContext) -> dict[str, float]:
        """Train, select, test once, and write the model."""
        from dqrm.training.world import join_world

        with join_world(self.exchange.config()) as world:
            return self._train(context, world)

    def _train(self, context: StageContext, world: "World") -> dict[str, float]:
        """As one of the processes of ``world``; what rank 0 returns counts."""
        from dqrm.compress.grids.records_file import read_records
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import (
            load_classifier,
            load_tokenizer,
            order_as,
            predict_text,
            read_config,
            save_classifier,
        )
        from dqrm.pipelines.text.finetune import FineTuner
        from dqrm.pipelines.text.labelled import LabelledText
        from dqrm.pipelines.text.positions import check_length
        from dqrm.pipelines.text.quality import measure_text
        from dqrm.pipelines.text.tables import Labels

        folder = model_folder(self.model, context.inputs)
        if read_records(folder):
            log.warning("%s is compressed already; training takes it off its grids", self.model)
        train, dev, test = self.data.read()
        config = read_config(folder)
        labels = order_as(Labels.of(train.labels, self.task, str(self.data.train)), config)
        log.info("%s", labels)
        self.check_head(config, labels)
        tokenizer = load_tokenizer(folder)
        model = load_classifier(folder, labels, self.seed)
        check_length(model, self.max_length)

        def encoded(examples: "Examples", where: Path | None) -> LabelledText:
            text = EncodedText(tokenizer, examples, self.max_length)
            return LabelledText(text, labels.encode(examples.labels, str(where)))

        recipe = self.recipe(self._selection(labels))
        teacher = self.load_teacher(labels, context)
        self._choose_attention(recipe, model, teacher)
        training = self.prepare(model, teacher, labels, recipe, context.inputs)
        # Before it trains: a label may be wrong.
        rows = None if test is None else encoded(test, self.data.test or self.data.train)
        tuner = FineTuner(
            model,
            encoded(train, self.data.train),
            encoded(dev, self.data.dev or self.data.train),
            recipe,
            training,
            context.scratch,
            context.tracker,
            context.stop,
            context.progress,
            world,
            self.exchange.config(),
        )
        context.tracker.log_params({"world_size": world.size})
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
        if rows is not None:
            logits = predict_text(
                model, rows.text, 2 * self.batch_size, bf16=recipe.bf16, world=world
            )
            classes = None if labels.classes is None else labels.num_outputs
            measured = measure_text(logits, rows.labels, classes)
            metrics |= {f"test/{name}": value for name, value in measured.items()}
        if not world.is_main:
            return metrics
        output = context.output / MODEL_FOLDER
        save_classifier(model, tokenizer, output)
        return metrics | self.complete(model, output)

    def _choose_attention(self, recipe: "Recipe", model: Any, teacher: Any) -> None:
        """Take the attention that trains faster; the teacher may be None."""
        from dqrm.pipelines.text.attention import LONGEST_PLAIN, use_plain_attention

        if recipe.bf16 and self.max_length <= LONGEST_PLAIN:
            use_plain_attention(model)
            if teacher is not None:
                use_plain_attention(teacher)

    def check_head(self, config: Any, labels: "Labels") -> None:
        """Say so where the model gets a new head.

        Args:
            config: of the model it takes.
            labels: of the data, in the order of the outputs of that model.

        Raises:
            ValueError: this stage takes the head as it is, and it does not fit.
        """
        from dqrm.pipelines.text.classifier import has_head

        outputs = labels.num_outputs
        if not has_head(config):
            log.info("%s has no head; it gets a new one of width %d", self.model, outputs)
        elif config.num_labels != outputs:
            log.info(
                "the head of %s has width %d; it gets a new one of width %d",
                self.model,
                config.num_labels,
                outputs,
            )

    @abstractmethod
    def prepare(
        self,
        model: Any,
        teacher: Any,
        labels: "Labels",
        recipe: "Recipe",
        inputs: Mapping[str, Path],
    ) -> "Training":
        """Change ``model`` as the settings say; return what it is then trained for, and under what.

        Args:
            model: as it was loaded.
            teacher: what :meth:`load_teacher` returned.
            labels: of the task.
            recipe: of the training.
            inputs: output folders of earlier stages, by name; none yet when only time is taken.

        Raises:
            ValueError: the settings do not fit the model.
        """

    def load_teacher(self, labels: "Labels", context: StageContext) -> Any:
        """The model to learn from; None learns from the labels."""
        return None

    @property
    def teacher(self) -> str | None:
        """What the teacher is called, if there is one."""
        return None

    def sizes(self, skeleton: Any) -> list[tuple[str, str]]:
        """More about the size of what it makes, for people.

        Args:
            skeleton: its own.
        """
        return []

    def complete(self, model: Any, folder: Path) -> dict[str, float]:
        """Write what else belongs to the trained model into its folder; return more metrics."""
        return {}

    def recipe(self, select_by: str) -> "Recipe":
        """The settings as the training loop takes them."""
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
            dropout=True,
            bf16=bf16_is_fast() if self.precision == "auto" else self.precision == "bf16",
            seed=self.seed,
            select_by=select_by,
            save_seconds=60 * self.save_minutes,
        )

    def _selection(self, labels: "Labels") -> str:
        """The metric to select by. Raises ValueError for one that the task does not have."""
        regression, outputs = labels.classes is None, labels.num_outputs
        if self.select_by == "auto":
            return "pearson" if regression else "accuracy"
        fits = ["pearson", "spearman"] if regression else ["accuracy", "matthews"]
        if not regression and outputs == 2:
            fits.append("f1")
        if self.select_by not in fits:
            kind = "a regression" if regression else f"{outputs} classes"
            raise ValueError(f"select_by={self.select_by}: {kind} can take {', '.join(fits)}")
        return self.select_by


def head_of(reference: str, earlier: Mapping[str, Stage]) -> Any:
    """The configuration of a model, as far as it tells the outputs; None while it is not known.

    Args:
        reference: a folder, package:NAME or stage:NAME, without problems of its own.
        earlier: the stages before the one that says so, by name.
    """
    from dqrm.pipelines.text.classifier import config_for, read_config

    key = named_stage(reference)
    if key is None:
        folder = outside_model(reference)
        assert folder is not None
        return read_config(folder)
    stage = earlier.get(key)
    before = dict(takewhile(lambda item: item[0] != key, earlier.items()))
    try:
        if isinstance(stage, TextTrainingStage):
            labels = stage.labels(before)
            return None if labels is None else config_for(labels)
        # What others make has the head of what they take.
        its_model = getattr(stage, "model", None)
        return None if its_model is None else head_of(its_model, before)
    except (OSError, ValueError):
        # A problem of that stage, which tells it.
        return None
