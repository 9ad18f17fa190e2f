"""N:M patterns found once or while training (see :mod:`dqrm.compress.transforms.admm`)."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dqrm.compress.grids.nm import NM
from dqrm.compress.transforms.base import Transform, matching_modules
from dqrm.compress.transforms.latent import add_step, latent_weight, settle
from dqrm.compress.transforms.patterns import NMStep


def count_search_steps(steps: int, polish: float) -> int:
    """Return how many of ``steps`` a mask is searched in; in the last ones it is fixed."""
    return steps - max(1, round(polish * steps))


class Sparsify(Transform):
    """Brings weights to an N:M pattern: a phase that searches it, then one that keeps it.

    Once the mask is fixed, weights outside it are zero in the latent tensor too, after every
    step, and so is what the optimizer holds of them.

    Args:
        match: patterns of the names of linear layers.
        pattern: of the weights.
        polish: share of the steps with the mask fixed, at the end.
    """

    order = 1

    def __init__(self, match: Sequence[str], pattern: NM, polish: float) -> None:
        if not 0 < polish <= 1:
            raise ValueError(f"polish={polish}: must be above 0 and at most 1")
        self.match = tuple(match)
        self.pattern = pattern
        self.polish = polish
        self.search_steps = 0
        self._steps: dict[str, NMStep] = {}
        self._modules: dict[str, nn.Module] = {}
        self._factors: dict[str, Tensor] = {}

    def attach(self, model: nn.Module, steps: int) -> None:
        """Search from now on, for all but the polish's share of ``steps``."""
        self._modules = matching_modules(model, self.match, (nn.Linear,))
        self.search_steps = count_search_steps(steps, self.polish)
        for name in self._modules:
            self._steps[name] = NMStep(self.pattern)
            add_step(model, name, self._steps[name])

    def before_forward(self, step: int) -> None:
        """Fix the mask when the search is over."""
        if step >= self.search_steps and not self.finished():
            self.cut()

    @torch.no_grad()
    def cut(self) -> None:
        """Fix the masks and zero the weights outside."""
        for name, weight in self.latent().items():
            step = self._steps[name]
            step.dynamic = False
            step.mask = self.final_mask(name, weight)
            weight.masked_fill_(~step.mask, 0.0)

    @abstractmethod
    def final_mask(self, name: str, weight: Tensor) -> Tensor:
        """Return the mask the search came to (bool, as ``weight``)."""

    @torch.no_grad()
    def after_step(
        self, step: int, lr: float, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Zero again what is outside the fixed masks."""
        if not self.finished():
            return
        for name, weight in self.latent().items():
            # Products with 0 and 1 take a fortieth of the time of masked_fill_.
            mask = self._factors.get(name)
            if mask is None:
                mask = self._factors[name] = self._steps[name].factors(weight)
            weight.mul_(mask)
            held = {} if optimizer is None else optimizer.state.get(weight, {})
            for value in held.values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.mul_(mask)

    def freeze(self) -> None:
        """Leave zeros outside the masks for good.

        Raises:
            RuntimeError: the search is not over.
        """
        if not self.finished():
            raise RuntimeError(
                f"the {self.pattern} masks are searched for {self.search_steps:,} steps and are "
                "not found yet: freezing would change what the model computes"
            )
        for module in self._modules.values():
            settle(module)

    def finished(self) -> bool:
        """Return whether the masks are fixed."""
        return all(s.mask is not None and not s.dynamic for s in self._steps.values())

    def latent(self) -> dict[str, nn.Parameter]:
        """Return the tensors an optimizer updates, by module."""
        return {name: latent_weight(module) for name, module in self._modules.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fixed masks."""
        return {
            f"{name}.mask": step.mask
            for name, step in self._steps.items()
            if step.mask is not None and not step.dynamic
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the masks of ``state``: of all modules, or of none while they are searched."""
        wanted = {f"{name}.mask" for name in self._steps}
        if state.keys() != wanted and (state or self.search_steps == 0):
            raise ValueError(f"the masks of the state are not those of {self.pattern} here")
        for name, step in self._steps.items():
            if state:
                step.mask = state[f"{name}.mask"].clone()
                step.dynamic = False
        self._factors.clear()


class OneShot(Sparsify):
    """Masks of the largest magnitudes before training, fixed from the first step on."""

    def __init__(self, match: Sequence[str], pattern: NM) -> None:
        super().__init__(match, pattern, polish=1.0)

    def attach(self, model: nn.Module, steps: int) -> None:
        """Cut at once."""
        super().attach(model, steps)
        self.cut()

    def final_mask(self, name: str, weight: Tensor) -> Tensor:
        """Return that of the magnitudes."""
        return self.pattern.mask(weight)


class SrSte(Sparsify):
    """Masks taken anew at every step, with a pull of the others to zero (arXiv 2102.04010).

    Gradients pass straight through the mask, so a zeroed weight can come back; what is outside
    the mask has ``decay * w`` added to its gradient.

    Args:
        match: patterns of the names of linear layers.
        pattern: of the weights.
        decay: lambda of the paper, which used 2e-4.
        polish: share of the steps with the mask fixed, at the end.
    """

    def __init__(
        self, match: Sequence[str], pattern: NM, decay: float = 2e-4, polish: float = 0.3
    ) -> None:
        super().__init__(match, pattern, polish)
        self.decay = decay

    def attach(self, model: nn.Module, steps: int) -> None:
        """Take masks at every forward from now on."""
        super().attach(model, steps)
        for step in self._steps.values():
            step.dynamic = True

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the pull to the gradients."""
        for name, weight in self.latent().items():
            step = self._steps[name]
            if step.dynamic and weight.grad is not None:
                # Not the last forward's: of several processes one without rows has run none.
                step.mask = self.pattern.mask(weight)
                weight.grad.add_(weight - weight * step.mask, alpha=self.decay)

    def final_mask(self, name: str, weight: Tensor) -> Tensor:
        """Return that of the magnitudes at the end of the search."""
        return self.pattern.mask(weight)
