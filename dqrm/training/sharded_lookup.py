"""Look-ups and updates of tables whose rows lie on several ranks.

    asker                                            owner of the rows
    ids of its samples, sorted by owner ----ids----> quantize the rows, pool each bag
    scatter, add what is of one bag    <--vectors--- a vector for each bag
    sum the gradients of each bag     --gradients--> one fused update for the bags of all ranks

What a bag is here, see dqrm.training.bag_requests. Means are made by the asker, who alone sees
whole bags. The exchange does all of it but the update, in the order of
all that it is asked.

Symbols: B samples of this rank, T tables, S sharded tables, D embedding_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm.comm.exchange import Exchange
from dqrm.comm.row_codec import Rows, row_codec_named
from dqrm.comm.thread import Pending
from dqrm.comm.vectors import VectorExchange, exchange_integers
from dqrm.comm.wire import RefusedError, Wire
from dqrm.kernels.tables import RowGradient
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.training.bag_requests import (
    Asked,
    Asker,
    OwnGradient,
    Served,
    TablePart,
    serve,
    take_tables,
)
from dqrm.training.config import ExchangeConfig
from dqrm.training.exchanged_step import TABLES

NAME = "sharded"
"""Begins the names of what is exchanged, in the meter."""


def kept_tables(bags: ShardedEmbeddingBags) -> dict[str, EmbeddingBagCollection]:
    """Return the replicated tables, if there are any, by their name in the exchange.

    The name tells which tables they are, by their rows: residuals of others are not theirs.
    """
    return {} if bags.kept is None else {f"{TABLES}.{bags.kept.num_rows}": bags.kept}


@dataclass(frozen=True)
class Answer:
    """What the exchange of one look-up brought."""

    vectors: Tensor
    """float32 [vectors, D], as asked for."""
    served: Served
    """What others asked."""


@dataclass(frozen=True)
class _Batch:
    """A batch whose sharded tables are being looked up."""

    indices: Tensor
    size: int
    kept: TablePart
    asked: Asked
    answer: Pending[Answer]
    lengths: Tensor | None
    """float32 [S * B, 1]: ids of each bag, where means are made."""


class ShardedLookup:
    """Looks up all tables of a sharded model, and sends gradients to the owners of rows.

    Every rank calls the same methods in the same order.

    Args:
        bags: this rank's part of the tables; looks up through this object from now on.
        exchange: of the ranks; everything is sent in its order.
        config: the codecs.
        seed: of stochastic rounding.
    """

    def __init__(
        self, bags: ShardedEmbeddingBags, exchange: Exchange, config: ExchangeConfig, seed: int
    ) -> None:
        self.bags = bags
        self._exchange = exchange
        self._seed = seed
        # A vector is used once, so that the nearest code serves it best. Gradients of a row add up
        # over steps, and must be right on average.
        self._codecs = {
            "vectors": Rows(row_codec_named(config.vectors).bits, "nearest"),
            "gradients": Rows(row_codec_named(config.vector_gradients).bits, "stochastic"),
        }
        self._asker = Asker(
            bags.placement,
            [table.name for table in bags.tables],
            [table.num_rows for table in bags.tables],
        )
        self._piece_rows = [piece.num_rows for piece in bags.pieces]
        self._batch: _Batch | None = None
        self._started = False
        """Whether the batch is still to be looked up."""
        bags.remote = self

    def start(self, indices: Tensor, offsets: Tensor | None) -> None:
        """Ask for the vectors of a batch, which the coming :meth:`lookup` is of.

        Raises:
            RefusedError: an id of this rank is outside its table.
        """
        bags, placement = self.bags, self.bags.placement
        tables = len(bags.tables)
        part = take_tables(indices, offsets, placement.sharded, tables)
        bags.owned.count_forward()
        scales, refusal, asked = bags.split_scales(), None, None
        try:
            asked = self._asker.ask(part, scales)
        except (IndexError, ValueError) as error:
            refusal = str(error)
        step = self._exchange.step
        plain = self._exchange.warming_up or not bags.training

        def answer(wire: Wire) -> Answer:
            lists = asked.lists if asked is not None else [_NO_INTEGERS] * wire.world_size
            received = exchange_integers(wire, f"{NAME}/ids", lists, step, refusal)
            assert asked is not None
            served = serve(received, self._piece_rows, len(scales))
            bags.set_split_scales(served.scales)
            channel = self._channel(wire, "vectors", plain)
            return Answer(
                channel.send(self._look_up(served), served.counts, asked.counts, step), served
            )

        pending = self._exchange.submit(answer)
        if asked is None:
            pending.wait()
            raise RefusedError(str(refusal))
        lengths = None
        if bags.pooling == "mean" and part.offsets is not None:
            lengths = part.offsets.diff().clamp_min(1).float().unsqueeze(1)
        size = (len(indices) if offsets is None else offsets.numel() - 1) // tables
        kept = take_tables(indices, offsets, placement.replicated, tables)
        self._batch = _Batch(indices, size, kept, asked, pending, lengths)
        self._started = True

    def lookup(self, indices: Tensor, offsets: Tensor | None, out: Tensor) -> None:
        """Write the pooled vectors of a batch to ``out``, float32 [B, T, D].

        Where the batch was not started it is now.
        """
        if not self._started:
            self.start(indices, offsets)
        batch = self._batch
        assert batch is not None
        assert batch.indices is indices
        self._started = False
        bags, placement = self.bags, self.bags.placement
        if bags.kept is not None:
            vectors = torch.empty(batch.size, len(placement.replicated), bags.embedding_dim)
            bags.kept.lookup(batch.kept.indices, batch.kept.offsets, vectors)
            out[:, list(placement.replicated)] = vectors
        out[:, list(placement.sharded)] = self._pooled(batch).transpose(0, 1)

    def _pooled(self, batch: _Batch) -> Tensor:
        """Return the vectors of the sharded tables, float32 [S, B, D]."""
        asked, vectors = batch.asked, batch.answer.wait().vectors
        tables = len(self.bags.placement.sharded)
        if asked.whole:
            found = vectors[asked.slot]
        else:
            count = tables * batch.size
            found = torch.zeros(count, self.bags.embedding_dim)
            found.index_add_(0, asked.bag, vectors[asked.slot])
        if batch.lengths is not None:
            found /= batch.lengths
        return found.view(tables, batch.size, self.bags.embedding_dim)

    def _look_up(self, served: Served) -> Tensor:
        """Return the vectors that others ask for, those for rank 0 first."""
        dim = self.bags.embedding_dim
        out = torch.empty(served.bags, len(self._piece_rows), dim)
        self.bags.owned.kernel.lookup(served.indices, served.offsets, out)
        return out.view(-1, dim)[served.place]

    def kept_gradient(self, grad: Tensor) -> RowGradient:
        """Return the summed gradients of the replicated rows that the last batch looked up.

        Args:
            grad: float32 [B, T, D], of what :meth:`lookup` wrote; samples may be any distance
                apart.
        """
        assert self._batch is not None
        assert self.bags.kept is not None
        own = grad[:, list(self.bags.placement.replicated)].contiguous()
        kept = self._batch.kept
        return self.bags.kept.kernel.row_gradient(kept.indices, kept.offsets, own)

    def send_gradient(self, grad: Tensor) -> Pending[OwnGradient]:
        """Send gradients to the owners of the rows that the last batch looked up.

        Args:
            grad: as for :meth:`kept_gradient`.

        Returns:
            What delivers the mean over ranks of the gradient for this rank's rows.
        """
        batch, dim = self._batch, self.bags.embedding_dim
        assert batch is not None
        flat = grad[:, list(self.bags.placement.sharded)].transpose(0, 1).reshape(-1, dim)
        if batch.lengths is not None:
            flat = flat / batch.lengths
        asked, served = batch.asked, batch.answer.wait().served
        summed = torch.zeros(sum(asked.counts), dim)
        summed.index_add_(0, asked.slot, flat if asked.whole else flat[asked.bag])
        step, plain = self._exchange.step, self._exchange.warming_up

        def send(wire: Wire) -> OwnGradient:
            channel = self._channel(wire, "gradients", plain)
            received = channel.send(summed, asked.counts, served.counts, step)
            # Places of empty bags are not read.
            own = torch.empty(served.bags, len(self._piece_rows), dim)
            own.view(-1, dim)[served.place] = received.div_(wire.world_size)
            return OwnGradient(served.indices, served.offsets, own)

        return self._exchange.submit(send)

    def _channel(self, wire: Wire, kind: str, plain: bool) -> VectorExchange:
        codec = Rows(32) if plain else self._codecs[kind]
        return VectorExchange(wire, f"{NAME}/{kind}", self.bags.embedding_dim, codec, self._seed)


_NO_INTEGERS = torch.empty(0, dtype=torch.int32)
