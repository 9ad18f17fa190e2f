"""``stage: lower``: a compressed classifier as it is shipped: packed weights, a runtime, its times.

Its output holds ``model/``, in Hugging Face's format with packed weights (dqrm.compress.lower). All
that is measured is measured on the model read back from there: how far it is from the model before,
its quality, and its latency, taking turns with an uncompressed model.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dqrm.pipelines.digests import folder_digest
from dqrm.pipelines.references import (
    compression_of,
    model_folder,
    outside_model,
    skeleton_of,
    stages_named,
)
from dqrm.pipelines.stage import MODEL_FOLDER, Interrupted, Problem, Product, Stage, StageContext
from dqrm.pipelines.stages.text_data import TextData
from dqrm.pipelines.stages.text_model import head_problems, length_problems, model_problems

if TYPE_CHECKING:
    from dqrm.compress.lower.build import Target

Bucket = tuple[PositiveInt, PositiveInt]


class LowerStage(Stage):
    """Pack a compressed classifier, and measure it as it is shipped."""

    makes: ClassVar[Product] = "packed model"

    stage: Literal["lower"] = "lower"
    """Pack a compressed classifier, and measure size, quality and latency of what is shipped."""

    model: str
    """Compressed or pruned: stage:NAME, or the folder of such a stage's model."""

    data: TextData
    """The rows of dev, and of test if given, are those it is measured on."""

    compare: str | None = None
    """Uncompressed model to measure latency beside: stage:NAME, package:NAME or a folder. None
    takes the model itself, its weights in FP32 and nothing quantized on the way."""

    target: Literal["auto", "int8", "bf16", "fp32"] = "auto"
    """What runs. int8: integers where inputs have 8 bits, else FP32. bf16: all of the model, inputs
    off their grids. fp32: the model as it was trained, slowly. auto: the fastest here of int8 and,
    where the CPU has it, bf16; in all buckets, on one thread."""

    shrink: bool = True
    """Deflate packed weights that get smaller by it; they are inflated when they are read."""

    buckets: tuple[Bucket, ...] = Field(default=((1, 32), (1, 128), (32, 64)), min_length=1)
    """Sentences and tokens a sentence at which latency is measured."""

    seconds: PositiveFloat = 4.0
    """To spend on each bucket and number of threads."""

    compiled: bool = False
    """Measure bf16 of the uncompressed model compiled by torch as well; that takes minutes."""

    task: Literal["auto", "classification", "regression"] = "auto"
    """auto: a regression where labels are fractions."""

    batch_size: PositiveInt = 64
    """Sentences at a time where quality is measured."""

    max_length: PositiveInt = 128
    """Tokens after which a sentence, or a pair, is cut."""

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stages of the two models."""
        return stages_named(earlier, model=self.model, compare=self.compare)

    def sources(self) -> dict[str, str]:
        """Digests of the tables, and of models from outside."""
        digests = self.data.digests()
        for name, reference in (("model", self.model), ("compare", self.compare)):
            folder = None if reference is None else outside_model(reference)
            if folder is not None:
                digests[name] = folder_digest(folder)
        return digests

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A missing package, model, file or column, and texts longer than a model can take."""
        from dqrm.pipelines.text.library import missing_reason

        reason = missing_reason()
        if reason is not None:
            found = [Problem("stage", reason)]
        else:
            found = model_problems("model", self.model) or head_problems("model", self.model)
            if self.compare is not None:
                found += model_problems("compare", self.compare, takes_text=False)
        found += self.data.problems()
        found = found or length_problems(self.model, earlier, self.max_length)
        if found:
            return found
        from dqrm.pipelines.text.latency import check_buckets

        if self.target == "int8" and compression_of(self.model, earlier) == ():
            return [Problem("target", f"int8: nothing of {self.model} is compressed")]
        for reference in (self.model, self.compare):
            model = None if reference is None else skeleton_of(reference, earlier)
            try:
                if model is not None:
                    check_buckets(model, self.buckets)
            except ValueError as error:
                return [Problem("buckets", str(error))]
        return []

    def skeleton(self, earlier: Mapping[str, Stage]) -> Any:
        """That of the model it takes."""
        return skeleton_of(self.model, earlier)

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """What runs, what it takes, and what is timed."""
        from dqrm.pipelines.text.account import planned_account

        skeleton, done = self.skeleton(earlier), compression_of(self.model, earlier)
        packed = []
        if skeleton is not None and done:
            deflated = " before it is deflated" if self.shrink else ""
            packed.append(("packed", f"{planned_account(skeleton, done)}{deflated}"))
        batches = ", ".join(f"{rows} x {tokens}" for rows, tokens in self.buckets)
        return [
            ("target", self.target),
            *packed,
            ("timed", f"{batches} tokens, {self.seconds:g} s each by number of threads"),
        ]

    def run(self, context: StageContext) -> dict[str, float]:
        """Pack, read back, measure."""
        from dqrm.compress.grids.records_file import load_records
        from dqrm.compress.lower.folder import (
            encoder_bytes,
            set_target,
            tensor_bytes,
            write_lowered,
        )
        from dqrm.compress.report import account
        from dqrm.pipelines.text.classifier import load_any, load_tokenizer
        from dqrm.pipelines.text.latency import check_buckets
        from dqrm.pipelines.text.positions import check_length

        source = model_folder(self.model, context.inputs)
        output = context.output / MODEL_FOLDER
        trained = load_any(source).eval()
        found = load_records(source, trained)
        if not found and self.target == "int8":
            raise ValueError(f"target=int8: nothing of {self.model} is compressed")
        # Read without its records, it is in FP32 throughout.
        other = source if self.compare is None else model_folder(self.compare, context.inputs)
        compared = load_any(other).eval()
        check_length(trained, self.max_length)
        for model in (trained, compared):
            check_buckets(model, self.buckets)
        write_lowered(
            trained,
            output,
            target="bf16" if self.target == "auto" else self.target,
            shrink=self.shrink,
        )
        load_tokenizer(source).save_pretrained(str(output))
        target = self._choose(output, bool(found), context)
        set_target(output, target)
        lowered = load_any(output)
        return {
            "size/parameters": float(sum(p.numel() for p in trained.parameters())),
            **account(trained).metrics(),
            "size/lowered_bytes": float(sum(tensor_bytes(output).values())),
            "size/encoder_bytes": float(encoder_bytes(output)),
            **self._quality(source, lowered, trained),
            **self._latency(lowered, compared, context),
        }

    def _choose(self, folder: Path, compressed: bool, context: StageContext) -> "Target":
        """The fastest target on one thread, if it is to be found."""
        from dqrm.compress.lower.hf import load_lowered
        from dqrm.pipelines.text.classifier import bf16_is_fast
        from dqrm.pipelines.text.latency import fastest, latencies

        if self.target != "auto":
            return self.target
        full: Target = "int8" if compressed else "fp32"
        if not bf16_is_fast():
            return full
        targets: list[Target] = [full, "bf16"]
        models = {str(target): load_lowered(folder, target) for target in targets}
        vocabulary = next(iter(models.values())).config.vocab_size
        measured = []
        for number, bucket in enumerate(self.buckets):
            _end_if_asked(context)
            context.progress("choosing", number, len(self.buckets), "buckets")
            measured.append(latencies(models, vocabulary, bucket, 1, self.seconds))
        return next(target for target in targets if target == fastest(measured))

    def _quality(self, source: Path, lowered: Any, trained: Any) -> dict[str, float]:
        """Metrics of the lowered model, and how far it is from the trained one on the dev rows."""
        from dqrm.pipelines.text.batches import EncodedText
        from dqrm.pipelines.text.classifier import (
            load_tokenizer,
            order_labels,
            predict_text,
            require_same_labels,
        )
        from dqrm.pipelines.text.quality import measure_text
        from dqrm.pipelines.text.tables import Labels

        train, dev, test = self.data.read()
        labels = order_labels(Labels.of(train.labels, self.task, str(self.data.train)), source)
        require_same_labels(lowered.config, labels, f"model={self.model}")
        classes = None if labels.classes is None else labels.num_outputs
        tokenizer = load_tokenizer(source)
        metrics: dict[str, float] = {}
        for prefix, examples, file in (
            ("best/val_", dev, self.data.dev),
            ("test/", test, self.data.test),
        ):
            if examples is None:
                continue
            text = EncodedText(tokenizer, examples, self.max_length)
            logits = predict_text(lowered, text, self.batch_size)
            truth = labels.encode(examples.labels, str(file or self.data.train))
            measured = measure_text(logits, truth, classes)
            metrics |= {f"{prefix}{name}": value for name, value in measured.items()}
            if examples is dev:
                wanted = predict_text(trained, text, self.batch_size)
                metrics["lower/max_abs_difference"] = float((logits - wanted).abs().max())
                if classes is not None:
                    same = (logits.argmax(1) == wanted.argmax(1)).double().mean()
                    metrics["lower/same_answers"] = float(same)
        return metrics

    def _latency(self, lowered: Any, compared: Any, context: StageContext) -> dict[str, float]:
        """Times of every bucket, on one thread and on all of them."""
        import torch

        from dqrm.pipelines.text.latency import latencies, latency_metrics, uncompressed

        models = {"lowered": lowered, **uncompressed(compared, self.compiled)}
        vocabulary = min(lowered.config.vocab_size, compared.config.vocab_size)
        metrics: dict[str, float] = {}
        counts = sorted({1, torch.get_num_threads()})
        for number, (threads, bucket) in enumerate(itertools.product(counts, self.buckets)):
            _end_if_asked(context)
            context.progress("timing", number, len(counts) * len(self.buckets), "buckets")
            times = latencies(models, vocabulary, bucket, threads, self.seconds)
            metrics |= latency_metrics(bucket, threads, times)
        return metrics


def _end_if_asked(context: StageContext) -> None:
    number = context.stop()
    if number is not None:
        raise Interrupted(number)
