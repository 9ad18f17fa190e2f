"""Several processes that train one text model, each on its rows of every batch.

All have the whole model and end every step with the same bits. Gradients of the word embeddings
are exchanged as the rows that the batch touched, all others by a dense codec.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.comm.exchange import Exchange, TableRows
from dqrm.comm.resharding import reshard
from dqrm.compress.transforms.base import Compression
from dqrm.kernels.tables import RowGradient
from dqrm.training.config import ExchangeConfig
from dqrm.training.exchange_metrics import ExchangeMetrics
from dqrm.training.exchanged_step import policy_of
from dqrm.training.world import World, gather_tensors

WORDS = "word_embeddings"
"""Name of the table of word embeddings in the exchange's policy and meter."""


class Replicas:
    """The model of one of the processes, and its exchange with the others.

    Making one is a collective call.

    Args:
        model: the same on all ranks.
        compression: attached to it.
        config: the codecs.
        world: of several ranks.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        model: Any,
        compression: Compression,
        config: ExchangeConfig,
        world: World,
        seed: int,
    ) -> None:
        self.world = world
        self._model = model
        self._compression = compression
        words = _word_embeddings(model)
        self._words = None if words is None else words[1]
        self._dense: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter is not self._words
        }
        tables = {} if words is None else {WORDS: TableRows(*words[1].shape)}
        self.exchange = Exchange(
            policy_of(config, tables),
            {name: parameter.numel() for name, parameter in self._dense.items()},
            tables,
            seed=seed,
            # All gradients are there before the first one is sent.
            overlap=False,
        )
        self._metrics = ExchangeMetrics(self.exchange)
        self._used: dict[str, nn.Parameter] | None = None

    def reduce(self, inputs: Mapping[str, Tensor]) -> None:
        """Make the gradients those of the whole batch: their means over the ranks.

        Args:
            inputs: of this rank's rows; empty if it has none, and so no gradients.
        """
        if self._used is None:
            self._used = self._with_gradient()
        for parameter in (*self._used.values(), *([] if self._words is None else [self._words])):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        touched = None
        if self._words is not None:
            assert self._words.grad is not None
            rows = (
                torch.unique(inputs["input_ids"]) if inputs else torch.zeros(0, dtype=torch.int64)
            )
            gradient = RowGradient(rows, self._words.grad[rows])
            touched = self.exchange.reduce_rows(WORDS, gradient)
        gradients = {name: parameter.grad for name, parameter in self._used.items()}
        dense = self.exchange.reduce_dense(gradients)  # type: ignore[arg-type]  # made above
        if touched is not None:
            merged = touched.wait()
            # This rank's rows are among them, and all others are 0 already.
            self._words.grad.index_copy_(0, merged.rows, merged.values)  # type: ignore[union-attr]
        dense.wait()

    def _with_gradient(self) -> dict[str, nn.Parameter]:
        """The parameters that get a gradient on some rank: a part of a model may take no part."""
        there = [float(parameter.grad is not None) for parameter in self._dense.values()]
        counts = self.exchange.sum(there).wait()
        named = zip(self._dense.items(), counts, strict=True)
        return {name: parameter for (name, parameter), count in named if count}

    def require_equal(self) -> None:
        """Hold the model and its compression equal on all ranks.

        Raises:
            ReplicasDifferError: they are not; raised on all ranks.
        """
        tensors = {
            **self._model.state_dict(),
            **{
                f"compression/{key}": value for key, value in self._compression.state_dict().items()
            },
        }
        self.exchange.require_equal({n: t.contiguous() for n, t in tensors.items()}).wait()

    def gather_state(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return the random generator's state and the residuals of every rank."""
        own = {"rng": torch.get_rng_state()}
        states = [of_rank["rng"] for of_rank in gather_tensors(own, self.world)]
        return states, gather_tensors(self.exchange.state_dict(), self.world)

    def load_residuals(self, states: list[dict[str, Tensor]]) -> None:
        """Owe what the ranks of a world of any size owed."""
        if states:
            own = reshard(states, self.world.size)[self.world.rank]
            self.exchange.load_state_dict(own)

    def metrics(self, steps: int) -> dict[str, float]:
        """Return what the exchange of the last ``steps`` steps cost."""
        return self._metrics.since_last(steps)


def _word_embeddings(model: Any) -> tuple[str, nn.Parameter] | None:
    """Name and values of the word embeddings; None if not trained, or if they are more than that.

    A weight that a layer shares has gradients in all of its rows.
    """
    weight = model.get_input_embeddings().weight
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if not weight.requires_grad or len(names) != 1:
        return None
    return names[0], weight
