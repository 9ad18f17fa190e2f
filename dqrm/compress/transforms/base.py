"""What a transform is, and the list of them that compresses a model.

    compression.attach(model, steps)      # then make the optimizer
    for step in range(steps):
        compression.before_forward(step)
        loss(model(batch)).backward()
        clip(model.parameters())
        compression.after_backward()
        optimizer.step()
        compression.after_step(step, lr, optimizer)
    compression.freeze()

Every transform works on one latent FP32 tensor a parameter, the one the optimizer updates. Frozen,
the module has the values of its last evaluation forward, and a record of their grid.
"""

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn


class Transform(ABC):
    """State attached to named modules of one model."""

    order: ClassVar[int]
    """Place among transforms of one model: layers 0, N:M 1, weight grid 2, activation grid 3."""

    @abstractmethod
    def attach(self, model: nn.Module, steps: int) -> None:
        """Attach to ``model``, which will be trained for ``steps`` optimizer steps in all.

        Raises:
            ValueError: nothing matches, what matches cannot be compressed so, or a schedule does
                not reach its end in time.
        """

    def before_forward(self, step: int) -> None:  # noqa: B027
        """Move schedules to ``step`` (0-based)."""

    def after_backward(self) -> None:  # noqa: B027
        """Add to gradients, which hold those of the task, clipped already."""

    def after_step(  # noqa: B027
        self, step: int, lr: float, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Correct parameters after the optimizer's step.

        Args:
            step: the one that was taken (0-based).
            lr: learning rate of that step.
            optimizer: where its state is to follow, too.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Make weights what the last evaluation forward used, for good; again has no effect."""

    def finished(self) -> bool:
        """Return whether what it does to the model no longer changes from step to step.

        A model is worth selecting from then on: earlier ones are not what freeze() gives.
        """
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the model's own tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``; attached already."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {', '.join(state)}")

    def metrics(self) -> dict[str, float]:
        """Return where it stands, by the names MLflow shows."""
        return {}

    def weight_count(self) -> int:
        """Return how many weights its metrics are about."""
        return 0


class Compression:
    """Transforms of one model, in order.

    Args:
        transforms: layers before N:M before weight grids before activation grids.

    Raises:
        ValueError: they are in another order.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        orders = [transform.order for transform in transforms]
        if orders != sorted(orders):
            names = ", ".join(type(transform).__name__ for transform in transforms)
            raise ValueError(
                f"{names}: transforms go layers, N:M, weight grid, activation grid, in this order"
            )
        self.transforms = tuple(transforms)

    def attach(self, model: nn.Module, steps: int) -> None:
        """As :meth:`Transform.attach`; make the optimizer afterwards."""
        for transform in self.transforms:
            transform.attach(model, steps)

    def before_forward(self, step: int) -> None:
        """As :meth:`Transform.before_forward`."""
        for transform in self.transforms:
            transform.before_forward(step)

    def after_backward(self) -> None:
        """As :meth:`Transform.after_backward`."""
        for transform in self.transforms:
            transform.after_backward()

    def after_step(
        self, step: int, lr: float, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """As :meth:`Transform.after_step`."""
        for transform in self.transforms:
            transform.after_step(step, lr, optimizer)

    def freeze(self) -> None:
        """As :meth:`Transform.freeze`."""
        for transform in self.transforms:
            transform.freeze()

    def finished(self) -> bool:
        """As :meth:`Transform.finished`, of all."""
        return all(transform.finished() for transform in self.transforms)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all, keys led by the transform's place."""
        return {
            f"{place}.{key}": value
            for place, transform in enumerate(self.transforms)
            for key, value in transform.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: it is the state of other transforms.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in self.transforms]
        for key, value in state.items():
            place, _, rest = key.partition(".")
            if not place.isdecimal() or int(place) >= len(parts):
                raise ValueError(f"{key} is no state of these {len(parts)} transforms")
            parts[int(place)][rest] = value
        for transform, part in zip(self.transforms, parts, strict=True):
            transform.load_state_dict(part)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all; of those with one name the mean over weights."""
        values: dict[str, list[float]] = {}
        weights: dict[str, list[int]] = {}
        for transform in self.transforms:
            for name, value in transform.metrics().items():
                values.setdefault(name, []).append(value)
                weights.setdefault(name, []).append(transform.weight_count())
        return {name: fmean(found, weights[name]) for name, found in values.items()}


def matching_modules(
    model: nn.Module, match: Sequence[str], kinds: tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """Return the modules of these kinds whose whole name one of the patterns matches.

    Args:
        model: of any kind.
        match: regular expressions; each must match a module.
        kinds: those that can be meant.

    Raises:
        ValueError: a pattern is malformed or matches no module; the message names the nearest.
    """
    candidates = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    found: set[str] = set()
    for text in match:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(f"match={text}: no regular expression: {error}") from error
        matched = {name for name in candidates if pattern.fullmatch(name)}
        if not matched:
            known = " or ".join(kind.__name__ for kind in kinds)
            near = difflib.get_close_matches(text, candidates, n=3, cutoff=0.0)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"match={text}: no {known} has this name{hint}")
        found |= matched
    return {name: module for name, module in candidates.items() if name in found}
