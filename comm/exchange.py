"""The exchange of all gradients of a model, as a trainer sees it.

    exchange = Exchange(
        Policy([("tables", RowRecipe()), ("*", Recipe(Blocks()))]),
        parameters={name: p.numel() for name, p in model.named_parameters()},
        tables={"tables": TableRows(rows=33_762_577, dim=16)},
    )
    for step, batch in enumerate(batches):
        exchange.start_step(step)
        ...                                                  # forward, backward
        rows = exchange.reduce_rows("tables", row_gradient)  # returns at once
        dense = exchange.reduce_dense(gradients)             # the same
        embedding.apply(*rows.wait(), rule, lr)              # the same rows and bits on all ranks
        dense.wait()                                         # the gradients are their mean now
        optimizer.step()

All ranks call the same methods in the same order. The work is done by one thread, in that order.
"""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from dqrm.comm.codecs import Cast
from dqrm.comm.dense import DenseReducer
from dqrm.comm.error_feedback import ErrorFeedback
from dqrm.comm.errors import AgreedError
from dqrm.comm.layout import Layout
from dqrm.comm.meter import Meter
from dqrm.comm.nodes import NodeDenseReducer, NodeRowReducer, Nodes
from dqrm.comm.numbers import NumberSum
from dqrm.comm.policy import Policy, Recipe, RowRecipe
from dqrm.comm.row_codec import Rows
from dqrm.comm.row_residuals import RowResiduals
from dqrm.comm.rows import RowReducer
from dqrm.comm.state_keys import DENSE, OWNED, ROWS, joined, split
from dqrm.comm.thread import Communication, Pending
from dqrm.comm.wire import Rounds, Wire
from dqrm.kernels.row_messages import hash_bytes
from dqrm.kernels.tables import RowGradient

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class TableRows:
    """A collection of tables whose rows are numbered through."""

    rows: int
    dim: int


class ReplicasDifferError(AgreedError):
    """Ranks hold different values where they should hold the same."""


class Exchange:
    """Exchanges the gradients of a model among ranks that all have the whole model.

    Args:
        policy: a recipe for every parameter and collection of tables.
        parameters: values of each dense parameter, by name.
        tables: rows of each collection of tables, by name.
        group: which nothing else may use meanwhile; None makes one of all ranks, with the default
            group's backend, which is a collective call.
        seed: of stochastic rounding.
        nodes: to exchange in two levels, from :func:`dqrm.comm.nodes.make_nodes`; residuals are
            then kept on the leaders only.
        generation: of the world; messages of another are refused.
        threads: of the native loops of rows.
        overlap: exchange on a thread beside the caller's, which wants a core of its own; else on
            the caller's, when it waits for a result, and then all that waits in common rounds. The
            same on all ranks.

    Raises:
        PolicyError: the policy does not fit the names.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: Mapping[str, int],
        tables: Mapping[str, TableRows] | None = None,
        *,
        group: ProcessGroup | None = None,
        nodes: Nodes | None = None,
        seed: int = 0,
        generation: int = 0,
        threads: int = 1,
        overlap: bool = True,
    ) -> None:
        tables = tables or {}
        self.policy = policy
        self._parameters = dict(parameters)
        self._recipes, row_recipes = policy.resolve(parameters, tables)
        self.meter = Meter()
        """What was sent and how long it took."""
        group = group if group is not None else distributed.new_group()
        assert isinstance(group, ProcessGroup)
        self._wire = Wire(group, self.meter, generation)
        self._numbers = NumberSum(self._wire)
        self._nodes = nodes
        # Where codecs are used: among all ranks, or among the leaders of nodes.
        self._coded: Wire | None = self._wire
        if nodes is not None:
            self._inside = Wire(nodes.node, self.meter, generation)
            self._coded = None
            if nodes.leaders is not None:
                self._coded = Wire(nodes.leaders, self.meter, generation)
        self.feedback = ErrorFeedback(self._coded.world_size if self._coded is not None else 1)
        """Residuals of dense parameters."""
        self.row_residuals: dict[str, RowResiduals] = {}
        """Residuals of this rank's rows, by collection."""
        self._owned: dict[str, RowResiduals] = {}
        self._seed, self._threads = seed, threads
        self._dense = {recipe: self._dense_reducer(recipe) for recipe in {*self._recipes.values()}}
        self._plain = self._dense_reducer(Recipe(Cast()))
        self._rows: dict[str, RowReducer | NodeRowReducer] = {}
        self._plain_rows: dict[str, RowReducer | NodeRowReducer] = {}
        for name, recipe in row_recipes.items():
            plain = RowRecipe(Rows(32), algorithm=recipe.algorithm)
            self._plain_rows[name] = self._row_reducer(name, tables[name], plain)
            self._rows[name] = self._row_reducer(name, tables[name], recipe)
        self._layouts: dict[tuple[str, ...], list[tuple[Recipe, Layout]]] = {}
        self._flat: dict[tuple[str, ...], Tensor] = {}
        self._step = 0
        self.overlap = overlap
        """Whether a thread beside the caller's exchanges."""
        self._thread = Communication(self.meter, overlap=overlap, send=self._wire.gather)

    def _dense_reducer(self, recipe: Recipe) -> DenseReducer | NodeDenseReducer:
        reducer = None
        if self._coded is not None:
            feedback = self.feedback if recipe.keeps_residual else None
            reducer = DenseReducer(
                self._coded, recipe.codec, feedback, recipe.algorithm, self._seed
            )
        if self._nodes is not None:
            return NodeDenseReducer(self._nodes, reducer, self.meter)
        assert reducer is not None
        return reducer

    def _row_reducer(
        self, name: str, shape: TableRows, recipe: RowRecipe
    ) -> RowReducer | NodeRowReducer:
        reducer = None
        if self._coded is not None:
            reducer = RowReducer(
                self._coded, name, shape.rows, shape.dim, recipe.codec, recipe.algorithm,
                seed=self._seed, threads=self._threads,
            )  # fmt: skip
            if recipe.kept_rows and self._coded.world_size > 1 and recipe.codec.bits < 32:
                reducer.residuals = RowResiduals(shape.rows, shape.dim, recipe.kept_rows)
                self.row_residuals[name] = reducer.residuals
                if reducer.algorithm == "owner":
                    reducer.owned = RowResiduals(shape.rows, shape.dim, recipe.kept_rows)
                    self._owned[name] = reducer.owned
        if self._nodes is not None:
            return NodeRowReducer(self._nodes, reducer, self._inside, name, shape.rows, shape.dim)
        assert reducer is not None
        return reducer

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._wire.world_size

    @property
    def rank(self) -> int:
        """This one."""
        return self._wire.rank

    def start_step(self, step: int) -> None:
        """Say which step the coming gradients are of; the same on all ranks.

        It decides on warm-up and is part of what random bits are made from.
        """
        self._step = step

    @property
    def step(self) -> int:
        """What start_step was last told."""
        return self._step

    @property
    def warming_up(self) -> bool:
        """Whether gradients of this step are sent in full precision."""
        return self._step < self.policy.warmup_steps

    def reduce_rows(self, name: str, gradient: RowGradient) -> Pending[RowGradient]:
        """Take the mean of a row-sparse gradient over all ranks.

        Args:
            name: of the collection of tables.
            gradient: as from EmbeddingTables.row_gradient: rows ascending without repeats, int64
                [n], and values, float32 [n, D]; n differs between ranks and may be 0. Not to be
                changed before the result is there.

        Returns:
            What delivers the union of the rows and their means, the same bits on all ranks; the
            tensors are valid until the next call with this name. In a world of one it is the
            gradient. See :meth:`dqrm.comm.rows.RowReducer.reduce` for errors.
        """
        reducer = (self._plain_rows if self.warming_up else self._rows)[name]
        step = self._step
        return self._thread.submit_rounds(lambda: reducer.rounds(gradient, step))

    def reduce_dense(self, gradients: Mapping[str, Tensor]) -> Pending[None]:
        """Replace dense gradients by their mean over all ranks, in place.

        Args:
            gradients: by parameter name, of any float dtype and shape; the same names in the same
                order on all ranks. Not to be read or changed before the result is there.

        Returns:
            What tells that it is done. See :meth:`dqrm.comm.dense.DenseReducer.reduce` for errors.
        """
        step, plain = self._step, self.warming_up
        return self._thread.submit_rounds(lambda: self._reduce_dense(gradients, step, plain))

    def reduce_flat(self, names: tuple[str, ...], values: Tensor) -> Pending[None]:
        """Do what :meth:`reduce_dense` does with gradients that lie one after the other.

        Args:
            names: of the parameters.
            values: float of their sizes together, contiguous.
        """
        step, plain = self._step, self.warming_up

        def reduce() -> Rounds[None]:
            parts = torch.split(values, [self._parameters[name] for name in names])
            gradients = dict(zip(names, parts, strict=True))
            return self._reduce_dense(gradients, step, plain, values)

        return self._thread.submit_rounds(reduce)

    def sum(self, numbers: Sequence[float]) -> Pending[list[float]]:
        """Sum numbers over all ranks, in the order of the ranks, in double precision."""
        step = self._step
        return self._thread.submit_rounds(lambda: self._numbers.rounds(numbers, step))

    def _reduce_dense(
        self, gradients: Mapping[str, Tensor], step: int, plain: bool, whole: Tensor | None = None
    ) -> Rounds[None]:
        if self.world_size == 1:
            return
        for recipe, layout in self._buckets(tuple(gradients)):
            name = f"{zlib.crc32(' '.join(layout.names).encode()):08x}"
            name = layout.names[0] if len(layout.names) == 1 else f"{layout.names[0]}+{name}"
            reducer = self._plain if plain else self._dense[recipe]
            if (
                whole is not None
                and len(layout.names) == len(gradients)
                and whole.dtype == torch.float32
            ):
                yield from reducer.rounds(name, layout, whole, step)
                continue
            parts = [gradients[parameter] for parameter in layout.names]
            flat = self._flat.setdefault(layout.names, torch.empty(layout.count))
            pieces = torch.split(flat, list(layout.counts))
            for piece, part in zip(pieces, parts, strict=True):
                piece.view(part.shape).copy_(part)
            yield from reducer.rounds(name, layout, flat, step)
            for piece, part in zip(pieces, parts, strict=True):
                part.copy_(piece.view(part.shape))

    def _buckets(self, names: tuple[str, ...]) -> list[tuple[Recipe, Layout]]:
        """Return the parameters of each recipe together, in their order."""
        known = self._layouts.get(names)
        if known is None:
            by_recipe: dict[Recipe, list[str]] = {}
            for name in names:
                by_recipe.setdefault(self._recipes[name], []).append(name)
            known = [
                (recipe, Layout(tuple(own), tuple(self._parameters[name] for name in own)))
                for recipe, own in by_recipe.items()
            ]
            self._layouts[names] = known
        return known

    def submit(self, function: Callable[[Wire], T]) -> Pending[T]:
        """Run further collectives, in the order of all that is asked.

        Args:
            function: gets the wire among all ranks; every rank submits the same collectives.
        """
        return self._thread.submit(lambda: function(self._wire))

    def require_equal(self, tensors: Mapping[str, Tensor]) -> Pending[None]:
        """Compare replicas by their hashes.

        Args:
            tensors: contiguous, by name; the same names in the same order on all ranks.

        Returns:
            What raises ReplicasDifferError, on all ranks, naming tensors and ranks that differ.
        """
        return self._thread.submit(lambda: self._compare(tensors))

    def _compare(self, tensors: Mapping[str, Tensor]) -> None:
        hashes = torch.tensor(
            [
                hash_bytes(tensor.detach().reshape(-1).view(torch.uint8)) - 2**63
                for tensor in tensors.values()
            ],
            dtype=torch.int64,
        )
        gathered = [torch.empty_like(hashes) for _ in range(self.world_size)]
        distributed.all_gather(gathered, hashes, group=self._wire.group)
        different = [
            f"{name!r} of rank {rank}"
            for at, name in enumerate(tensors)
            for rank in range(1, self.world_size)
            if gathered[rank][at] != gathered[0][at]
        ]
        if different:
            raise ReplicasDifferError(f"not what rank 0 holds: {', '.join(different)}")

    def rescale(self, factor: float) -> None:
        """Multiply all residuals by old learning rate / new one, when it changes."""
        self._thread.submit(lambda: self._rescale(factor)).wait()

    def _rescale(self, factor: float) -> None:
        self.feedback.rescale(factor)
        for residuals in (*self.row_residuals.values(), *self._owned.values()):
            residuals.rescale(factor)

    def residual_norms(self) -> dict[str, float]:
        """Return the norm of what is kept of each parameter and collection on this rank."""
        norms = self.feedback.norms()
        return norms | {name: kept.norm() for name, kept in self.row_residuals.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of this rank's residuals, once all that was asked for is done.

        Every rank's is to be saved, and :func:`dqrm.comm.resharding.reshard` makes of them those of
        a world of another size.
        """
        return self._thread.submit(self._state).wait()

    def _state(self) -> dict[str, Tensor]:
        state = joined(DENSE, "", self.feedback.state_dict())
        for kind, kept in ((ROWS, self.row_residuals), (OWNED, self._owned)):
            for name, residuals in kept.items():
                state |= joined(kind, name, residuals.state_dict())
        return state

    def unknown_tables(self, state: Mapping[str, Tensor]) -> set[str]:
        """Return the keys of a state's residuals of tables that are not exchanged here."""
        return {
            key
            for (kind, name), parts in split(state).items()
            if kind != DENSE and name not in self._rows
            for key in joined(kind, name, parts)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned on this rank of a world of this size.

        Residuals that the policy no longer keeps are dropped, and a warning tells their norm.

        Raises:
            ValueError: it has residuals of parameters or tables that this model does not have.
        """
        parts = split(state)
        dense = parts.pop((DENSE, ""), {})
        unknown = {key.split("/", 1)[1] for key in dense} - set(self._parameters)
        unknown |= {name for _, name in parts} - set(self._rows)
        if unknown:
            raise ValueError(f"residuals of unknown {', '.join(sorted(map(repr, unknown)))}")
        kept = {name for name, recipe in self._recipes.items() if recipe.keeps_residual}
        for key in [key for key in dense if key.split("/", 1)[1] not in kept]:
            if dense[key].is_floating_point():
                self._dropped(key, dense[key])
            del dense[key]
        self.feedback.load_state_dict(dense)
        for (kind, name), of_rows in sorted(parts.items(), reverse=True):
            residuals = (self.row_residuals if kind == ROWS else self._owned).get(name)
            if residuals is not None:
                residuals.load_state_dict(of_rows)
            elif kind == OWNED and name in self.row_residuals:
                # No rank owns rows here; each owes W times its part of the mean instead.
                self.row_residuals[name].add(of_rows, float(self.feedback.world_size))
            else:
                self._dropped(name, of_rows["values"])
                self._dropped(name, of_rows["waiting_values"])

    def _dropped(self, name: str, residual: Tensor) -> None:
        norm = float(residual.norm())
        if norm:
            _log.warning("residuals of %r are dropped, norm %g: the policy keeps none", name, norm)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was asked for and end the communication thread."""
        self._thread.close(timeout)
