"""Which option to take for each matrix of a fine-tuned transformer, under a budget of bytes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dqrm.compress.signals.allocate import Candidate
from dqrm.compress.signals.budget import Allocated, Budget, spend
from dqrm.compress.signals.candidates import WeightOption
from dqrm.compress.signals.curvature import hutchinson_trace
from dqrm.compress.signals.gradients import fisher_diagonal
from dqrm.pipelines.text.attention import use_plain_attention
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.objective import TaskLoss

Signal = Literal["fisher", "trace"]


def allocate_options(
    weights: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor],
    options: Sequence[WeightOption],
    budget: Budget,
    check: Callable[[], None],
) -> Allocated:
    """Choose an option for each matrix.

    Args:
        weights: the matrices by name, float32 [out, in].
        curvature: what stands for the diagonal of the loss's Hessian, by the same names.
        options: what a matrix may become.
        budget: of the bytes of the matrices together.
        check: called between matrices; may raise.

    Raises:
        ValueError: even the smallest options are larger.
    """
    candidates: dict[str, list[Candidate]] = {}
    for name, weight in weights.items():
        check()
        candidates[name] = [option.candidate(weight, curvature[name]) for option in options]
    return spend(candidates, sum(4 * weight.numel() for weight in weights.values()), budget)


def weight_curvature(
    model: Any,
    modules: Mapping[str, nn.Module],
    signal: Signal,
    rows: LabelledText,
    batches: Iterable[Sequence[int]],
    seed: int,
) -> dict[str, Tensor]:
    """Return what stands for the diagonal of the loss's Hessian, float32, of each weight.

    Args:
        model: a classifier or regressor, in evaluation mode. Nothing but the weights has
            gradients afterwards.
        modules: linear layers of it, by name.
        signal: the empirical Fisher information, [out, in], or the average of the trace
            (arXiv 1911.03852), [].
        rows: what the loss is taken on.
        batches: rows of each loss.
        seed: of what draws the probes of traces.
    """
    task = TaskLoss(regression=model.config.problem_type == "regression", bf16=False)
    model.requires_grad_(False)
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        assert isinstance(module.weight, nn.Parameter)
        weights[name] = module.weight.requires_grad_()
    if signal == "fisher":
        losses = (task(model, rows.text.batch(batch), rows.labels[batch]) for batch in batches)
        return fisher_diagonal(weights, losses)
    attention = model.config._attn_implementation
    use_plain_attention(model)  # A fused one cannot be differentiated twice.
    try:
        return _mean_trace(task, model, weights, rows, batches, seed)
    finally:
        model.set_attn_implementation(attention)


def _mean_trace(
    task: TaskLoss,
    model: Any,
    weights: Mapping[str, Tensor],
    rows: LabelledText,
    batches: Iterable[Sequence[int]],
    seed: int,
) -> dict[str, Tensor]:
    """Traces over the number of weights, with a probe a batch.

    Where little curves, noise makes some negative: their size is as good a guess as any, and a
    weight that costs nothing would get the fewest bits there are.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(weights), dtype=torch.float64)
    count = 0
    for batch in batches:
        loss = partial(task, model, rows.text.batch(batch), rows.labels[batch])
        traces = hutchinson_trace(loss, list(weights.values()), 1, generator)
        sums += torch.tensor(traces, dtype=torch.float64)
        count += 1
    sizes = [weight.numel() for weight in weights.values()]
    means = [abs(float(total)) / count / size for total, size in zip(sums, sizes, strict=True)]
    return {name: torch.tensor(mean) for name, mean in zip(weights, means, strict=True)}
