"""The fused step of one rank among several: gradients are exchanged while others are computed.

    forward, loss -------------------------------------------> sum of losses      (all-reduce)
    backward: top MLP ---------------------------------------> its gradients      (dense codec)
              interaction, touched rows ---------------------> rows and gradients (row codec)
              bottom MLP ------------------------------------> its gradients      (dense codec)
    update: every rank applies the same merged rows and means, bit for bit

Each arrow is sent by the exchange's thread while the next line is computed. Where a rank has one
core only, two threads would take turns on it by the millisecond: there all ranks send everything
together in the end.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import distributed

from dqrm.comm.codecs import codec_named
from dqrm.comm.exchange import Exchange, TableRows
from dqrm.comm.policy import Policy, Recipe, RowRecipe
from dqrm.comm.row_codec import row_codec_named
from dqrm.data.batch import Batch
from dqrm.kernels.mlp import DenseStack, StackPrecision
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.training.config import ExchangeConfig
from dqrm.training.consensus import Consensus
from dqrm.training.optimizer import DenseOptimizer, Optimizer
from dqrm.training.step import FusedStep, check_loss
from dqrm.training.world import World

TABLES = "emb_l"
"""Name of the embedding tables in the exchange's policy and meter."""


def make_exchange(optimizer: Optimizer, config: ExchangeConfig, seed: int) -> Exchange:
    """Return the exchange of all gradients of a model; a collective call.

    Args:
        optimizer: of the model.
        config: the codecs.
        seed: of stochastic rounding.
    """
    return exchange_of(optimizer, {TABLES: optimizer.collection}, config, seed)


def exchange_of(
    optimizer: DenseOptimizer,
    collections: Mapping[str, EmbeddingBagCollection],
    config: ExchangeConfig,
    seed: int,
) -> Exchange:
    """Return the exchange of the gradients that all ranks have; a collective call.

    Args:
        optimizer: of the model.
        collections: of the tables that all ranks have, by their names in the exchange.
        config: the codecs.
        seed: of stochastic rounding.
    """
    return Exchange(
        policy_of(config, collections),
        {name: parameter.numel() for name, parameter in optimizer.dense_parameters.items()},
        {name: TableRows(c.num_rows, c.embedding_dim) for name, c in collections.items()},
        seed=seed,
        overlap=_all_have_cores_to_spare(),
    )


def policy_of(config: ExchangeConfig, tables: Iterable[str]) -> Policy:
    """Return the recipes of row gradients of ``tables`` and of all other gradients."""
    rows = RowRecipe(row_codec_named(config.rows), residual_rows=config.residual_rows)
    codec = codec_named(config.dense)
    dense = Recipe(codec, error_feedback=config.error_feedback and not codec.linear)
    recipes: list[tuple[str, Recipe | RowRecipe]] = [(name, rows) for name in tables]
    return Policy([*recipes, ("*", dense)], warmup_steps=config.warmup_steps)


def _all_have_cores_to_spare() -> bool:
    """Whether every rank can exchange beside computing; a collective call."""
    spare = torch.tensor([float(torch.get_num_threads() > 1)])
    distributed.all_reduce(spare)
    return int(spare) == distributed.get_world_size()


class ExchangedStep(FusedStep):
    """A step on this rank's share of a batch.

    Args:
        model: the same on all ranks, in training mode.
        optimizer: of that model.
        exchange: of its gradients.
        world: of its ranks.
        consensus: asked in every step.
        precision: of the products in the MLPs.
        seed: as in FusedStep; dropout drops the units it drops in a world of one.
    """

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        exchange: Exchange,
        world: World,
        consensus: Consensus,
        precision: StackPrecision = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, precision, seed)
        self.exchange = exchange
        self.world = world
        self.consensus = consensus
        self._bottom_names = parameter_names(self.bottom, optimizer)
        self._top_names = parameter_names(self.top, optimizer)

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, exchange, update; return the mean loss of the whole batch.

        ``batch`` is this rank's share, and may be empty.
        """
        world, exchange = self.world, self.exchange
        # The mean over ranks of what is divided by this is the mean over the whole batch.
        own = self._forward(batch, step, rows=batch.whole_rows / world.size)
        exchange.start_step(step)
        whole_loss = self.consensus.start(own / world.size, None if exchange.overlap else exchange)
        self._backward_top(step)
        top = exchange.reduce_flat(self._top_names, self.top.gradient)
        self._backward_interaction()
        grad_pooled = self._activations.grad_vectors[:, 1:]
        touched = exchange.reduce_rows(
            TABLES,
            self.collection.kernel.row_gradient(batch.indices, batch.offsets, grad_pooled),
        )
        self._backward_bottom(step)
        bottom = exchange.reduce_flat(self._bottom_names, self.bottom.gradient)
        loss = check_loss(whole_loss(), step)
        merged = touched.wait()
        top.wait()
        bottom.wait()
        self.optimizer.apply(merged, step)
        return loss


def parameter_names(stack: DenseStack, optimizer: DenseOptimizer) -> tuple[str, ...]:
    """Return the names of a stack's parameters in the order of its gradient."""
    names = {id(p): name for name, p in optimizer.dense_parameters.items()}
    return tuple(names[id(parameter)] for layer in stack.layers for parameter in layer[:2])
