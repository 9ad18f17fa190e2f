"""The exchange of the published DQRM, for comparison (arXiv 2410.20046, section 3.3, and its code).

One scale a table, and one an output channel of an MLP, is the mean over ranks of the ranks' largest
magnitudes: what lies above is clipped. Residuals are kept for MLPs only, and are what the mean over
ranks took away from a rank's own gradient. Codes travelled in FP32; so they do here.

    python -m dqrm.bench.published CONFIG.yaml      # one worker; started by dqrm.study.launch
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed

from dqrm.comm.codecs import codec_named
from dqrm.comm.exchange import Exchange, TableRows
from dqrm.comm.policy import Policy, Recipe, RowRecipe
from dqrm.comm.row_codec import row_codec_named
from dqrm.comm.thread import Pending
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.kernels.tables import RowGradient
from dqrm.runtime import prepare_threads
from dqrm.training import exchanged_step
from dqrm.training.config import ExchangeConfig
from dqrm.training.optimizer import Optimizer
from dqrm.training.run import train

_LARGEST = 127


class PublishedExchange(Exchange):
    """Rounds gradients to shared grids before they are exchanged in FP32."""

    def __init__(self, optimizer: Optimizer, seed: int) -> None:
        collection = optimizer.collection
        tables = {exchanged_step.TABLES: TableRows(collection.num_rows, collection.embedding_dim)}
        plain = Recipe(codec_named("fp32")), RowRecipe(row_codec_named("fp32"))
        super().__init__(
            Policy([(exchanged_step.TABLES, plain[1]), ("*", plain[0])]),
            {name: parameter.numel() for name, parameter in optimizer.dense_parameters.items()},
            tables,
            seed=seed,
        )
        self._starts = collection.table_start
        self._shapes = {name: p.shape for name, p in optimizer.dense_parameters.items()}
        self._residuals: dict[str, Tensor] = {}

    def reduce_rows(self, name: str, gradient: RowGradient) -> Pending[RowGradient]:
        """Round to one grid a table, then take the mean."""
        table = torch.searchsorted(self._starts, gradient.rows, right=True) - 1
        largest = torch.zeros(len(self._starts))
        if len(gradient.rows):
            largest.scatter_reduce_(0, table, gradient.values.abs().amax(dim=1), "amax")
        scale = self._shared(largest)[table, None]
        return super().reduce_rows(
            name, RowGradient(gradient.rows, _rounded(gradient.values, scale))
        )

    def reduce_dense(self, gradients: Mapping[str, Tensor]) -> Pending[None]:
        """Round to one grid an output channel, then take the mean."""
        owed = {}
        for name, gradient in gradients.items():
            residual = self._residuals.setdefault(name, torch.zeros_like(gradient))
            owed[name] = gradient + residual
            rows = owed[name] if gradient.dim() > 1 else owed[name][None]
            scale = self._shared(rows.abs().amax(dim=1, keepdim=True))
            gradient.copy_(_rounded(rows, scale).view_as(gradient))
        super().reduce_dense(gradients).wait()
        for name, gradient in gradients.items():
            torch.sub(owed[name], gradient, out=self._residuals[name])
        return self._thread.submit(lambda: None)

    def reduce_flat(self, names: tuple[str, ...], values: Tensor) -> Pending[None]:
        """Do the same with gradients that lie one after the other."""
        parts = torch.split(values, [self._shapes[name].numel() for name in names])
        return self.reduce_dense(
            {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        )

    def _shared(self, largest: Tensor) -> Tensor:
        """Return scales from the mean over ranks of the largest magnitudes."""
        distributed.all_reduce(largest)
        return largest / self.world_size / _LARGEST


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    codes = (values / scale.clamp_min(1e-30)).round().clamp(-_LARGEST, _LARGEST)
    return codes * scale


def _make_exchange(optimizer: Optimizer, config: ExchangeConfig, seed: int) -> Exchange:
    return PublishedExchange(optimizer, seed)


if __name__ == "__main__":
    chosen = load(RunConfig, Path(sys.argv[1]), [])
    prepare_threads(chosen.train.threads)
    exchanged_step.make_exchange = _make_exchange
    train(chosen, resume="auto")
