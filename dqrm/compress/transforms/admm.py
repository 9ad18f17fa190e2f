"""N:M patterns by ADMM (arXiv 2110.15766): weights are pulled to the pattern while they learn.

With W the latent weight, Z the nearest matrix of the pattern and U the scaled dual:

    every step          W <- W - min(1, lr rho) (W - Z + U)         decoupled, after the optimizer
                        or grad <- grad + rho (W - Z + U)           grad
    every dual update   Z' = project(W + U);  U <- U + W - Z';  Z <- Z'
    at the cut          mask = support of Z;  W <- W where kept, else 0

Decoupled, rho is in units of 1 / lr: lr rho is the share of the distance gone in a step. Added to
the gradient, Adam divides it by the gradient's size, and the same rho can pull too little or tear
the weights away. When rho grows, U shrinks by the same factor: the dual variable itself is rho U.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dqrm.compress.grids.joint import project_joint
from dqrm.compress.grids.nm import NM, project
from dqrm.compress.schedules import Constant, Geometric, Linear, Schedule
from dqrm.compress.transforms.latent import weight_steps
from dqrm.compress.transforms.sparsify import Sparsify
from dqrm.compress.transforms.weights import FakeQuantizeWeight

Coupling = Literal["decoupled", "grad"]
Ramp = Literal["constant", "linear", "geometric"]

_GROWTH = 1.5
"""Of rho from one dual update to the next on a geometric ramp."""


class Admm(Sparsify):
    """Finds masks by ADMM, then polishes with the masks fixed.

    Args:
        match: patterns of the names of linear layers.
        pattern: of the weights.
        rho: strength of the pull at the end of the search.
        coupling: decoupled from the optimizer, or part of the gradient.
        ramp: how rho gets there, dual update by dual update: in a line, or by a factor of 1.5.
        updates: dual updates of the whole search.
        polish: share of the steps with the mask fixed, at the end.
        joint: project to the pattern and the weight grid of the same layers at once.
    """

    def __init__(
        self,
        match: Sequence[str],
        pattern: NM,
        rho: float,
        *,
        coupling: Coupling = "decoupled",
        ramp: Ramp = "linear",
        updates: int = 12,
        polish: float = 0.3,
        joint: bool = False,
    ) -> None:
        super().__init__(match, pattern, polish)
        if rho < 0 or updates < 1:
            raise ValueError(f"rho={rho}, updates={updates}: must be 0 or more and 1 or more")
        self.coupling = coupling
        ramps: dict[Ramp, Schedule] = {
            "constant": Constant(rho),
            "linear": Linear(rho / updates, rho, 0, updates - 1),
            "geometric": Geometric(rho, _GROWTH, updates - 1),
        }
        self._rhos = ramps[ramp]
        self.updates = updates
        self.joint = joint
        self._z: dict[str, Tensor] = {}
        self._u: dict[str, Tensor] = {}
        self._rho = 0.0
        self._residuals = torch.zeros(3, dtype=torch.float64)
        """Primal, dual, and what the cut took away, each as a share of a norm."""

    def attach(self, model: nn.Module, steps: int) -> None:
        """Start from the projection of the weights."""
        super().attach(model, steps)
        if self.search_steps < self.updates:
            raise ValueError(
                f"{self.updates} dual updates in {self.search_steps:,} steps of search "
                f"({steps:,} less the polish's {self.polish:.0%}): lower updates or train longer"
            )
        for name, weight in self.latent().items():
            self._z[name] = project(weight.detach(), self.pattern)
            self._u[name] = torch.zeros_like(self._z[name])

    def before_forward(self, step: int) -> None:
        """Set rho for ``step``, and cut when the search is over."""
        if step == 0 and self.joint:
            for name, module in self._modules.items():
                _grid_step(name, module)
        self._rho = self._rhos.at(self._updates_before(step))
        super().before_forward(step)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the pull to the gradients, where it is coupled to them."""
        if self.coupling != "grad" or self.finished():
            return
        for name, weight in self.latent().items():
            if weight.grad is not None:
                weight.grad.add_(weight - self._z[name] + self._u[name], alpha=self._rho)

    @torch.no_grad()
    def after_step(
        self, step: int, lr: float, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Pull, and update Z and U where that is due."""
        super().after_step(step, lr, optimizer)
        if self.finished():
            return
        if self.coupling == "decoupled" and self._rho:
            share = min(1.0, lr * self._rho)
            for name, weight in self.latent().items():
                weight.lerp_(self._z[name] - self._u[name], share)
        done = self._updates_before(step)
        if self._updates_before(step + 1) > done:
            self._update_duals(self._rho, self._rhos.at(done + 1))

    @torch.no_grad()
    def cut(self) -> None:
        """As :meth:`Sparsify.cut`, noting how much of the weights it took away."""
        before = sum(float(weight.square().sum()) for weight in self.latent().values())
        super().cut()
        after = sum(float(weight.square().sum()) for weight in self.latent().values())
        self._residuals[2] = (max(0.0, before - after) / max(before, 1e-30)) ** 0.5
        self._z.clear()
        self._u.clear()

    def final_mask(self, name: str, weight: Tensor) -> Tensor:
        """Return the support of Z, filled up by magnitude where Z has zeros of its own."""
        ahead = weight.masked_fill(self._z[name] != 0, torch.inf)
        return self.pattern.mask(ahead)

    def _updates_before(self, step: int) -> int:
        """Dual updates that lie before ``step``, spread evenly over the search."""
        return min(step, self.search_steps) * self.updates // max(1, self.search_steps)

    def _update_duals(self, rho: float, next_rho: float) -> None:
        primal = dual = norm = dual_norm = 0.0
        for name, weight in self.latent().items():
            u, old = self._u[name], self._z[name]
            z = self._project(name, weight + u)
            u += weight - z
            primal += float((weight - z).square().sum())
            dual += float((z - old).square().sum())
            norm += float(weight.square().sum())
            dual_norm += float(u.square().sum())
            self._z[name] = z
            if next_rho:
                u *= rho / next_rho
        self._residuals[0] = (primal / max(norm, 1e-30)) ** 0.5
        self._residuals[1] = rho * (dual / max(dual_norm, 1e-30)) ** 0.5

    def _project(self, name: str, weight: Tensor) -> Tensor:
        if not self.joint:
            return project(weight, self.pattern)
        step = _grid_step(name, self._modules[name])
        return project_joint(weight, self.pattern, step.bits, step.granularity, step.current_grid)

    def state_dict(self) -> dict[str, Tensor]:
        """Return masks, Z, U and the residuals."""
        held = {f"{name}.z": value for name, value in self._z.items()}
        held |= {f"{name}.u": value for name, value in self._u.items()}
        return {**super().state_dict(), **held, "residuals": self._residuals}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from masks, Z, U and residuals."""
        rest = dict(state)
        if "residuals" not in rest:
            raise ValueError("the state is none of ADMM: it has no residuals")
        self._residuals = rest.pop("residuals").clone()
        parts = {".z": self._z, ".u": self._u}
        for part in parts.values():
            part.clear()
        for key in list(rest):
            name, suffix = key[:-2], key[-2:]
            if suffix in parts and name in self._steps:
                parts[suffix][name] = rest.pop(key).clone()
        super().load_state_dict(rest)
        if not self.finished() and not set(self._z) == set(self._u) == set(self._steps):
            raise ValueError("the state has not Z and U of all modules: it is of another model")

    def metrics(self) -> dict[str, float]:
        """Residuals of the last dual update, rho, and what the cut took away."""
        primal, dual, removed = self._residuals.tolist()
        found = {"admm/primal_residual": primal, "admm/dual_residual": dual}
        return found | ({"admm/cut": removed} if self.finished() else {"admm/rho": self._rho})

    def weight_count(self) -> int:
        """Return how many weights its metrics are about."""
        return sum(weight.numel() for weight in self.latent().values())


def _grid_step(name: str, module: nn.Module) -> FakeQuantizeWeight:
    for step in weight_steps(module):
        if isinstance(step, FakeQuantizeWeight):
            return step
    raise ValueError(f"{name}: joint needs a weight grid on the same module")
