"""``stage: promote``: make a candidate the champion, if it is as good on rows that neither saw.

The candidate and the champion of MLflow's registry predict the same rows, and the differences of
their AUC and log loss are judged with the standard errors that pairing allows. A candidate that
passes becomes a version of the registered model with the alias ``champion``; the one it follows
keeps the alias ``previous``. Every version was champion once: any can be again.

Its output holds ``promotion.json``, what was measured and decided.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dqrm.pipelines.record import read_record
from dqrm.pipelines.references import named_stage, stages_named
from dqrm.pipelines.stage import (
    DATA_FOLDER,
    MODEL_FOLDER,
    GateNotMet,
    Stage,
    StageContext,
)
from dqrm.tracking.errors import StoreError
from dqrm.tracking.model_reference import CHAMPION, MODEL_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from dqrm.data.dataset import PreparedDataset
    from dqrm.tracking.registry import Registry
    from dqrm.training.metrics import Metrics

log = logging.getLogger(__name__)

TAG = "dqrm.promotion"
_DIGEST_TAG = f"{TAG}.stage"
_OVER_TAG = f"{TAG}.over"
_NOBODY = "none"


@dataclass(frozen=True)
class Verdict:
    """What was measured, and whether the candidate passes."""

    passed: bool
    reason: str
    metrics: dict[str, float]


class PromoteStage(Stage):
    """Promote a model in MLflow's registry."""

    stage: Literal["promote"] = "promote"
    """Make a candidate the champion of MLflow's registry, if it is good enough."""

    candidate: str
    """stage:NAME of the stage that trained it."""

    model: str = Field(pattern=f"^{MODEL_NAME}$")
    """Name of the model in the registry."""

    data: str
    """stage:NAME of the stage that prepared the rows both are measured on, or the folder of a
    prepared data set."""

    split: Literal["train", "validation", "test"] = "test"
    """Which of its rows."""

    min_auc: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Least AUC of a champion; alone decides on the first one."""

    max_log_loss: PositiveFloat | None = None
    """Largest log loss of a champion; the same."""

    auc_margin: PositiveFloat = 0.002
    """By how much its AUC may be below the champion's; that it is not by more must be beyond
    chance, which few rows cannot show."""

    log_loss_margin: PositiveFloat | None = None
    """By how much its log loss may be above the champion's; None does not look at it."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """What counts as beyond chance (one-sided)."""

    rejected: Literal["fail", "go on"] = "fail"
    """What the pipeline does when the candidate does not pass; fail ends it with exit code 3."""

    batch_size: PositiveInt = 16384
    """Rows predicted at a time."""

    @model_validator(mode="after")
    def _decides(self) -> Self:
        if named_stage(self.candidate) is None:
            raise ValueError(f"candidate={self.candidate}: name a stage, stage:NAME")
        if self.min_auc is None and self.max_log_loss is None:
            raise ValueError("give min_auc or max_log_loss: one of them decides on the first model")
        return self

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stages of the candidate and of the rows."""
        return stages_named(earlier, candidate=self.candidate, data=self.data)

    def sources(self) -> dict[str, str]:
        """Digest of a prepared data set from outside."""
        if named_stage(self.data) is not None:
            return {}
        from dqrm.data.manifest import read_manifest

        return {"data": read_manifest(Path(self.data)).digest}

    def run(self, context: StageContext) -> dict[str, float]:
        """Measure both, decide, and move the alias.

        Raises:
            GateNotMet: the candidate did not pass, and that is to end the pipeline.
            StoreError: another champion came while it was measured, or MLflow is away.
        """
        from dqrm.data.dataset import PreparedDataset
        from dqrm.tracking.registry import Registry

        registry = Registry.of(context.tracking)
        folder = context.inputs[str(named_stage(self.candidate))]
        record = read_record(folder)
        if record is None or record.run_id is None:
            raise ValueError(
                f"{self.candidate} was made while {registry.uri} did not answer, so its model is "
                f"not there; make it again: --from {named_stage(self.candidate)}"
            )
        champion = self._champion(registry, record.run_id)
        key = named_stage(self.data)
        dataset = PreparedDataset.open(
            Path(self.data) if key is None else context.inputs[key] / DATA_FOLDER
        )
        verdict = self._judge(context, registry, folder / MODEL_FOLDER, champion, dataset)
        tags = {
            TAG: "promoted" if verdict.passed else "rejected",
            f"{TAG}.reason": verdict.reason,
            _OVER_TAG: champion or _NOBODY,
        }
        if verdict.passed:
            now = self._champion(registry, record.run_id)
            if now != champion:
                raise StoreError(
                    f"the champion of {self.model} was version {champion} when the candidate was "
                    f"held against it, and is version {now} now; run the pipeline again"
                )
            more = {_DIGEST_TAG: context.digest, "dqrm.data.digest": dataset.digest}
            version = registry.register(self.model, record.run_id, {**tags, **more})
            registry.crown(self.model, version)
            tags[f"{TAG}.version"] = version
        self._report(context, tags, verdict)
        if not verdict.passed and self.rejected == "fail":
            context.tracker.log_metrics(verdict.metrics, step=0)
            raise GateNotMet(f"the candidate is not promoted: {verdict.reason}")
        return verdict.metrics

    def _champion(self, registry: "Registry", run_id: str) -> str | None:
        """The version to hold the candidate against, if there is one."""
        champion = registry.aliases(self.model).get(CHAMPION)
        if champion is None:
            return None
        version = registry.version(self.model, champion)
        if version is None or version.run_id != run_id:
            return champion
        # An earlier attempt at this stage was cut off after it had moved the alias.
        over = version.tags.get(_OVER_TAG, _NOBODY)
        return None if over == _NOBODY else str(over)

    def _judge(
        self,
        context: StageContext,
        registry: "Registry",
        model: Path,
        champion: str | None,
        dataset: "PreparedDataset",
    ) -> Verdict:
        from dqrm.training.metrics import measure

        logits, labels = self._predict(model, "the candidate", dataset)
        own = measure(logits, labels)
        metrics = own.as_dict("candidate/")
        faults = self._floors(own)
        if champion is None:
            reason = "; ".join(faults) or "the first one"
            return Verdict(not faults, reason, {**metrics, "promotion/passed": float(not faults)})
        name = f"version {champion} of {self.model}"
        file = registry.download_model(self.model, champion, context.scratch / champion)
        theirs, _ = self._predict(file.parent, name, dataset)
        metrics |= measure(theirs, labels).as_dict("champion/")
        worse, differences = self._compare(labels, theirs, logits)
        faults += worse
        reason = "; ".join(faults) or f"not worse than {name}"
        passed = {"promotion/passed": float(not faults)}
        return Verdict(not faults, reason, {**metrics, **differences, **passed})

    def _predict(
        self, model: Path, name: str, dataset: "PreparedDataset"
    ) -> "tuple[Tensor, Tensor]":
        from dqrm.serving.artifact import load_artifact
        from dqrm.serving.predictor import find_artifact
        from dqrm.training.evaluate import predict
        from dqrm.training.translated import fit_to

        fitting = fit_to(load_artifact(find_artifact(model)), dataset, name)
        return predict(fitting, dataset.split(self.split), self.batch_size)

    def _floors(self, own: "Metrics") -> list[str]:
        faults = []
        if self.min_auc is not None and not own.auc >= self.min_auc:
            faults.append(f"AUC {own.auc:.4f} is below min_auc={self.min_auc:g}")
        if self.max_log_loss is not None and not own.log_loss <= self.max_log_loss:
            faults.append(
                f"log loss {own.log_loss:.4f} is above max_log_loss={self.max_log_loss:g}"
            )
        return faults

    def _compare(
        self, labels: "Tensor", champion: "Tensor", candidate: "Tensor"
    ) -> tuple[list[str], dict[str, float]]:
        """What is worse than it may be, and the differences as metrics."""
        from dqrm.training.paired import compare_auc, compare_log_loss

        faults = []
        metrics: dict[str, float] = {}
        for key, label, margin, compare in (
            ("auc", "AUC", self.auc_margin, compare_auc),
            ("log_loss", "log loss", self.log_loss_margin, compare_log_loss),
        ):
            found = compare(labels, champion, candidate)
            metrics[f"promotion/{key}_gain"] = found.gain
            metrics[f"promotion/{key}_gain_error"] = found.standard_error
            if margin is not None and not found.not_worse(margin, self.confidence):
                faults.append(
                    f"{label} {found.second:.4f} after the champion's {found.first:.4f}: a gain of "
                    f"{found.gain:+.4f} +- {found.standard_error:.4f} may be worse than "
                    f"{-margin:g} ({self.confidence:.0%})"
                )
        return faults, metrics

    def _report(self, context: StageContext, tags: dict[str, str], verdict: Verdict) -> None:
        context.tracker.set_tags(tags)
        context.tracker.describe(f"{tags[TAG]}: {verdict.reason}")
        report: dict[str, Any] = {"model": self.model, **tags, "metrics": verdict.metrics}
        path = context.output / "promotion.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        context.tracker.log_artifact(path)
        log.info("%s: %s", tags[TAG], verdict.reason)
