"""Optimizers of embedding rows: settings, state and formulas, for the loops and in plain torch.

Only the rows a batch touched are read and written. With g the summed gradient of a row, w its
weights, d = lr * weight_decay:

    sgd      w' = (w - lr g) - d w
    adagrad  s' = s + mean(g^2)         w' = (w - (lr / (sqrt(s') + eps)) g) - d w
    adam     m' = beta1 m + (1 - beta1) g;  v' = beta2 v + (1 - beta2) g^2
             w' = (w - (lr / (1 - beta1^t)) m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)) - d w

adagrad is row-wise, with one sum a row where Adagrad keeps D, as in facebookresearch/dlrm and
FBGEMM; adam is arXiv 1412.6980, algorithm 1, with moments of untouched rows left alone and bias
corrected by the global step t, as in torch.optim.SparseAdam.
"""

import math
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from dqrm.kernels import huge_pages
from dqrm.kernels.cpu import native
from dqrm.kernels.dlpack import capsule
from dqrm.kernels.row_storage import RowStorage

LANES = 16
"""Running sums that a mean of squares is made of, whatever the width of the processor's."""


class RowRule:
    """One optimizer over the rows of a storage.

    Args:
        name: which formula.
        storage: of the rows; the state is kept in its ``state_dtype``.
        eps: added to the denominator of adagrad and adam.
        betas: decay of adam's moments.
        weight_decay: decoupled decay of touched rows, in units of the learning rate.
    """

    def __init__(
        self,
        name: Literal["sgd", "adagrad", "adam"],
        storage: RowStorage,
        *,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.name = name
        self.eps = eps
        self.betas = betas
        self.weight_decay = weight_decay
        self._state: dict[str, Tensor] = {}
        rows, dim, dtype = len(storage.tensor), storage.dim, storage.state_dtype
        if name == "adagrad":
            self._state["sum"] = huge_pages.zeros(rows, dtype=dtype)
        elif name == "adam":
            self._state["first"] = huge_pages.zeros(rows, dim, dtype=dtype)
            self._state["second"] = huge_pages.zeros(rows, dim, dtype=dtype)
            self._state["steps"] = torch.zeros((), dtype=torch.int64)

    def state(self) -> dict[str, Tensor]:
        """Return the state by name; writing into these tensors restores it.

        ``sum`` [R] for adagrad; ``first`` and ``second`` [R, D] and ``steps`` (int64 scalar) for
        adam.
        """
        return self._state

    def corrections(self) -> tuple[float, float]:
        """Return 1 - beta1^t and 1 - beta2^t of the coming step; ones where none corrects bias."""
        if self.name != "adam":
            return 1.0, 1.0
        t = int(self._state["steps"]) + 1
        return 1.0 - self.betas[0] ** t, 1.0 - self.betas[1] ** t

    def count_step(self) -> None:
        """Note that the step was taken."""
        if self.name == "adam":
            self._state["steps"] += 1

    @cached_property
    def native(self) -> Any:
        """The compiled loops' view of this rule."""
        module = native()
        assert module is not None
        first = self._state.get("sum", self._state.get("first"))
        second = self._state.get("second")
        return module.RowRule(
            self.name,
            self.eps,
            *self.betas,
            self.weight_decay,
            None if first is None else capsule(first.view(first.shape[0], -1)),
            None if second is None else capsule(second),
        )

    def step_reference(
        self, storage: RowStorage, rows: Tensor, gradient: Tensor, lr: float
    ) -> None:
        """Update some rows in place: what the compiled loops do, bit for bit.

        Args:
            storage: of the rows.
            rows: int64 [U], distinct.
            gradient: float32 [U, D].
            lr: learning rate.
        """
        storage.begin_step()
        before = storage.read(rows)
        after = before - self._change(storage, rows, gradient, lr)
        if self.weight_decay:
            after -= (lr * self.weight_decay) * before
        storage.write(rows, after)
        self.count_step()

    def _change(self, storage: RowStorage, rows: Tensor, gradient: Tensor, lr: float) -> Tensor:
        state, dim = self._state, storage.dim
        if self.name == "sgd":
            return lr * gradient
        if self.name == "adagrad":
            total = storage.read_state(state["sum"], rows) + mean_square_reference(gradient)
            storage.write_state(state["sum"], rows, total, first=dim)
            return (torch.tensor(lr) / (_sqrt(total) + self.eps)).unsqueeze(1) * gradient
        beta1, beta2 = self.betas
        c1, c2 = self.corrections()
        first = beta1 * storage.read_state(state["first"], rows) + (1 - beta1) * gradient
        second = beta2 * storage.read_state(state["second"], rows)
        second += (1 - beta2) * (gradient * gradient)
        storage.write_state(state["first"], rows, first, first=dim)
        storage.write_state(state["second"], rows, second, first=2 * dim)
        return (lr / c1 * first) / (_sqrt(second) * (1 / math.sqrt(c2)) + self.eps)


def _sqrt(values: Tensor) -> Tensor:
    """Return the correctly rounded root; that of torch may be off by one unit in the last place."""
    return values.double().sqrt().float()


def mean_square_reference(values: Tensor) -> Tensor:
    """Return the mean of the squares of each row, float32 [U] of float32 [U, D].

    Column j goes into running sum j % 16; the sums are added up in halves, 8 + 8 first.
    """
    squares = torch.nn.functional.pad(values * values, (0, -values.shape[1] % LANES))
    sums = torch.zeros(values.shape[0], LANES)
    for columns in torch.split(squares, LANES, dim=1):
        sums = sums + columns
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0] / values.shape[1]
