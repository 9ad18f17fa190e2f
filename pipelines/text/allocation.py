"""Which option to take for each matrix of a fine-tuned transformer, under a budget of bytes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dqrm.compress.signals.allocate import Candidate, allocate
from dqrm.compress.signals.candidates import WeightOption
from dqrm.compress.signals.gradients import fisher_diagonal
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.objective import TaskLoss


@dataclass(frozen=True)
class Allocated:
    """What an allocation came to."""

    chosen: dict[str, int]
    """Option of each matrix, by its name."""
    candidates: dict[str, list[Candidate]]
    """Of each matrix, in the order of the options."""
    fp32_bytes: int
    """Of the matrices as they are."""
    budget: int
    """Bytes that the choice takes at most."""

    def total(self, chosen: Mapping[str, int]) -> Candidate:
        """Bytes and expected loss of a choice."""
        taken = [self.candidates[name][option] for name, option in chosen.items()]
        return Candidate(sum(c.cost for c in taken), sum(c.loss for c in taken))

    def best_uniform(self) -> int | None:
        """The option with the least expected loss that the budget pays for in every matrix."""
        options = range(len(next(iter(self.candidates.values()))))
        totals = {n: self.total(dict.fromkeys(self.chosen, n)) for n in options}
        fitting = [n for n in options if totals[n].cost <= self.budget]
        return min(fitting, key=lambda n: totals[n].loss, default=None)


@dataclass(frozen=True)
class Budget:
    """Bytes that matrices may take together; one of its fields is None."""

    ratio: float | None
    """Times that they shall be smaller than in FP32, at least."""
    like: int | None
    """Option that would take as many, had all of them this one."""

    def bytes(self, candidates: Iterable[Sequence[Candidate]], fp32_bytes: int) -> int:
        """Return them.

        Args:
            candidates: of each matrix.
            fp32_bytes: of the matrices as they are.
        """
        if self.like is not None:
            return sum(options[self.like].cost for options in candidates)
        assert self.ratio is not None
        return int(fp32_bytes / self.ratio)


def allocate_options(
    model: Any,
    modules: Mapping[str, nn.Module],
    options: Sequence[WeightOption],
    budget: Budget,
    rows: LabelledText,
    batches: Sequence[Sequence[int]],
    check: Callable[[], None],
    progress: Callable[[int, int], None],
) -> Allocated:
    """Choose an option for each matrix, by the Fisher information of its weights.

    Args:
        model: a classifier or regressor, in evaluation mode.
        modules: linear layers of it, by name.
        options: what a matrix may become.
        budget: of the bytes of the matrices together.
        rows: what gradients are taken on.
        batches: rows of each gradient.
        check: called between batches; may raise.
        progress: takes the batches done, and all of them.

    Raises:
        ValueError: even the smallest options are larger.
    """
    task = TaskLoss(regression=model.config.problem_type == "regression", bf16=False)
    model.requires_grad_(False)
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        assert isinstance(module.weight, nn.Parameter)
        weights[name] = module.weight.requires_grad_()

    def losses() -> Iterator[Tensor]:
        for done, batch in enumerate(batches):
            check()
            progress(done, len(batches))
            yield task(model, rows.text.batch(batch), rows.labels[batch])

    fisher = fisher_diagonal(weights, losses())
    candidates: dict[str, list[Candidate]] = {}
    for name, weight in weights.items():
        check()
        value = weight.detach()
        candidates[name] = [option.candidate(value, fisher[name]) for option in options]
    fp32_bytes = sum(4 * weight.numel() for weight in weights.values())
    most = budget.bytes(candidates.values(), fp32_bytes)
    picked = allocate(list(candidates.values()), most)
    return Allocated(dict(zip(weights, picked, strict=True)), candidates, fp32_bytes, most)
