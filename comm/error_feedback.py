"""Error feedback: what a codec lost is added to the next gradient (EF-SGD, arXiv 1901.09847).

Every rank keeps a residual for its own gradients, and, where an owner encodes sums again, one for
the share of them that it owns. Both are kept by parameter name, so that buckets may be cut anew.

Symbols: W ranks, e the residual of a rank, f of an owner. What is applied to a parameter in a step
is mean(sent) + f's share, so (sum of e) / W + f is what is still owed, and is conserved:

    another share of owners   e += W f for the owner's part, f = 0: the same sum
    another learning rate     e and f times old / new: what is owed counts in weights, not gradients
    another world W'          e_j = W' / W * (sum of e_i over i with i % W' = j); f's parts are
                              joined, and split again bit for bit
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dqrm.comm.layout import Layout, Piece

_WORKER, _OWNER, _BEGIN, _WHOLE = "worker/", "owner/", "owner_begin/", "owner_whole/"


class ErrorFeedback:
    """Residuals of dense parameters on one rank, float32, zero at first.

    Args:
        world_size: W.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._worker: dict[str, Tensor] = {}
        self._flat: dict[tuple[str, ...], Tensor] = {}
        self._owner: dict[str, tuple[int, Tensor]] = {}
        self._shares: dict[tuple[str, ...], tuple[tuple[Piece, ...], Tensor]] = {}
        self._whole: dict[str, Tensor] = {}

    def worker(self, layout: Layout) -> Tensor:
        """Return this rank's residual of a bucket, float32 [N], to be changed in place.

        Raises:
            ValueError: a parameter has another number of values than its residual.
        """
        flat = self._flat.get(layout.names)
        if flat is not None and flat.numel() == layout.count:
            return flat
        flat = torch.zeros(layout.count)
        for piece in layout.pieces:
            view = flat[piece.at : piece.at + piece.count]
            known = self._worker.get(piece.name)
            if known is not None:
                _require(piece.name, known, piece.count)
                view.copy_(known)
            self._worker[piece.name] = view
        own = set(layout.names)
        self._flat = {names: kept for names, kept in self._flat.items() if own.isdisjoint(names)}
        self._flat[layout.names] = flat
        return flat

    def owner(self, layout: Layout, share: tuple[Piece, ...]) -> Tensor:
        """Return the residual of the sums this rank owns in a bucket, float32, in place.

        Args:
            layout: the bucket.
            share: this rank's part of it; none where no rank owns any, and what owners kept goes
                back to the workers' residuals.
        """
        known = self._shares.get(layout.names)
        if known is not None and known[0] == share:
            return known[1]
        flat = torch.zeros(sum(piece.count for piece in share))
        worker = self.worker(layout)
        mine = {piece.name: piece for piece in share}
        for piece in layout.pieces:
            if not self._owns(mine.get(piece.name)):
                self._return(piece.name, worker[piece.at : piece.at + piece.count], bool(share))
        at = 0
        for piece in share:
            view = flat[at : at + piece.count]
            at += piece.count
            if piece.name in self._owner:
                view.copy_(self._owner[piece.name][1])
            elif (whole := self._whole.get(piece.name)) is not None:
                view.copy_(whole[piece.begin : piece.begin + piece.count])
            self._owner[piece.name] = piece.begin, view
        if share:
            for name in layout.names:
                self._whole.pop(name, None)
        own = set(layout.names)
        self._shares = {
            names: kept for names, kept in self._shares.items() if own.isdisjoint(names)
        }
        self._shares[layout.names] = share, flat
        return flat

    def _owns(self, piece: Piece | None) -> bool:
        """Whether the residual that is kept is that of just this piece."""
        if piece is None or piece.name not in self._owner:
            return False
        begin, residual = self._owner[piece.name]
        return begin == piece.begin and residual.numel() == piece.count

    def _return(self, name: str, worker: Tensor, owned: bool) -> None:
        """Move what was owed for a parameter by owners to the workers."""
        begin, residual = self._owner.pop(name, (0, None))
        if residual is not None:
            worker[begin : begin + residual.numel()].add_(residual, alpha=self.world_size)
        if not owned and (whole := self._whole.pop(name, None)) is not None:
            # Every rank has all of it: each adds its part of the mean.
            worker.add_(whole)

    def norms(self) -> dict[str, float]:
        """Return the Euclidean norm of each parameter's residual on this rank."""
        return {name: float(residual.norm()) for name, residual in self._worker.items()}

    def rescale(self, factor: float) -> None:
        """Multiply all residuals: old learning rate / new one, when it changes."""
        for residual in self._all():
            residual.mul_(factor)

    def clear(self) -> None:
        """Set all residuals to zero."""
        for residual in self._all():
            residual.zero_()

    def _all(self) -> Iterable[Tensor]:
        yield from self._worker.values()
        yield from (residual for _, residual in self._owner.values())
        yield from self._whole.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all residuals of this rank, under names that tell what they are."""
        state = {_WORKER + name: residual.clone() for name, residual in self._worker.items()}
        for name, (begin, residual) in self._owner.items():
            state[_OWNER + name] = residual.clone()
            state[_BEGIN + name] = torch.tensor(begin)
        state |= {_WHOLE + name: residual.clone() for name, residual in self._whole.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` or :func:`reshard` returned for this rank."""
        fresh = ErrorFeedback(self.world_size)
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind + "/" == _WORKER:
                fresh._worker[name] = value.clone().view(-1)
            elif kind + "/" == _OWNER:
                fresh._owner[name] = int(state[_BEGIN + name]), value.clone().view(-1)
            elif kind + "/" == _WHOLE:
                fresh._whole[name] = value.clone().view(-1)
            elif kind + "/" != _BEGIN:
                raise ValueError(f"state of error feedback: what is {key!r}?")
        self.__dict__.update(fresh.__dict__)


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    """Return the states of ``world_size`` ranks from those of all ranks of another world.

    Args:
        states: what :meth:`ErrorFeedback.state_dict` returned, by rank.
        world_size: W'. As many as there are states: they are returned as they are.
    """
    old = len(states)
    if world_size == old:
        return [dict(state) for state in states]
    result: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    worker_keys = {key for state in states for key in state if key.startswith(_WORKER)}
    for key in sorted(worker_keys):
        for rank, target in enumerate(result):
            parts = [state[key] for state in states[rank::world_size] if key in state]
            if parts:
                target[key] = torch.stack(parts).sum(0) * (world_size / old)
    for name, whole in _joined_owners(states).items():
        for target in result:
            target[_WHOLE + name] = whole.clone()
    return result


def _joined_owners(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the owners' residuals of each parameter, whole."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for state in states:
        for key, value in state.items():
            if key.startswith(_OWNER):
                name = key.removeprefix(_OWNER)
                parts.setdefault(name, []).append((int(state[_BEGIN + name]), value))
    wholes = {
        key.removeprefix(_WHOLE): value
        for state in states
        for key, value in state.items()
        if key.startswith(_WHOLE)
    }
    for name, of_name in parts.items():
        wholes[name] = torch.cat([value for _, value in sorted(of_name, key=lambda part: part[0])])
    return wholes


def _require(name: str, residual: Tensor, count: int) -> None:
    if residual.numel() != count:
        raise ValueError(
            f"the residual of {name!r} has {residual.numel()} values, the parameter {count}"
        )
