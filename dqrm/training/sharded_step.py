"""The fused step of one rank among several that share out the large tables.

    ids of the sharded tables ---------------------------------> owners; their pooled vectors
    forward: bottom MLP; replicated tables, interaction, top MLP
    loss ------------------------------------------------------> sum of losses      (all-reduce)
    backward: top MLP -----------------------------------------> its gradients      (dense codec)
              interaction, gradients of pooled vectors --------> owners             (vector codec)
              touched replicated rows -------------------------> rows and gradients (row codec)
              bottom MLP --------------------------------------> its gradients      (dense codec)
    update: all ranks alike, but for the rows that a rank has alone

Each arrow is sent by the exchange's thread while the next line is computed, or, where this rank has
a single core, when its result is waited for.
"""

from dqrm.comm.exchange import Exchange
from dqrm.data.batch import Batch
from dqrm.kernels.mlp import StackPrecision
from dqrm.models.dlrm import DLRM
from dqrm.training.consensus import Consensus
from dqrm.training.exchanged_step import parameter_names
from dqrm.training.sharded_lookup import ShardedLookup, kept_tables
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.step import FusedPasses, check_loss
from dqrm.training.world import World


class ShardedStep(FusedPasses):
    """A step on this rank's share of a batch.

    Args:
        model: this rank's part, in training mode.
        optimizer: of that model.
        lookup: of its tables.
        exchange: of its gradients.
        world: of the ranks.
        consensus: asked in every step.
        precision: of the products in the MLPs.
        seed: as in FusedPasses; dropout drops the units it drops in a world of one.
    """

    def __init__(
        self,
        model: DLRM,
        optimizer: ShardedOptimizer,
        lookup: ShardedLookup,
        exchange: Exchange,
        world: World,
        consensus: Consensus,
        precision: StackPrecision = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(model, precision, seed)
        self.optimizer = optimizer
        self.lookup = lookup
        self.exchange = exchange
        self.world = world
        self.consensus = consensus
        self._kept = list(kept_tables(lookup.bags))
        self._bottom_names = parameter_names(self.bottom, optimizer)
        self._top_names = parameter_names(self.top, optimizer)

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, exchange, update; return the mean loss of the whole batch.

        ``batch`` is this rank's share, and may be empty.
        """
        world, exchange, lookup = self.world, self.exchange, self.lookup
        exchange.start_step(step)
        lookup.start(batch.indices, batch.offsets)
        # The mean over ranks of what is divided by this is the mean over the whole batch.
        own = self._forward(batch, step, rows=batch.whole_rows / world.size)
        whole_loss = self.consensus.start(own / world.size, None if exchange.overlap else exchange)
        self._backward_top(step)
        top = exchange.reduce_flat(self._top_names, self.top.gradient)
        self._backward_interaction()
        grad_pooled = self._activations.grad_vectors[:, 1:]
        sent = lookup.send_gradient(grad_pooled)
        touched = [
            exchange.reduce_rows(name, lookup.kept_gradient(grad_pooled)) for name in self._kept
        ]
        self._backward_bottom(step)
        bottom = exchange.reduce_flat(self._bottom_names, self.bottom.gradient)
        loss = check_loss(whole_loss(), step)
        served = sent.wait()
        kept = [gradient.wait() for gradient in touched]
        top.wait()
        bottom.wait()
        self.optimizer.apply(kept[0] if kept else None, served, step)
        return loss
