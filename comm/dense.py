"""Mean of dense gradients over all ranks, as compressed messages or by a plain all-reduce.

Symbols: W ranks, C the codec, g a rank's gradient, e its residual, f an owner's.

    linear      all-reduce of C(g)
    gather      every rank sends C(g + e) to every other; all add them in the order of the ranks
    scatter     rank i sends C(part j of g + e) to rank j, which adds those it gets in the order of
                the ranks, divides by W, adds f, and sends C of that to all

Bytes a rank sends, P being the whole payload: 2 (W-1)/W P, (W-1) P, 2 (W-1)/W P. All ranks end
with the same bits: every value is computed in one order, from the same messages.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dqrm.comm.codecs import Cast, Codec
from dqrm.comm.error_feedback import ErrorFeedback
from dqrm.comm.layout import Layout, Piece, runs, shares
from dqrm.comm.message import HEADER_BYTES, REFUSAL, Header, MessageError, name_checksum
from dqrm.comm.wire import Outgoing, Received, Rounds, Wire
from dqrm.kernels.rounding import step_key

Algorithm = Literal["auto", "gather", "scatter"]

_LEAST_BUFFER = 4096


class DenseReducer:
    """Replaces the values of a bucket by their mean over all ranks.

    Args:
        wire: to exchange messages on.
        codec: how values are sent.
        feedback: keeps what the codec lost; None forgets it.
        algorithm: "auto" gathers in a world of two, in one phase and without a second rounding,
            and scatters in larger ones. A linear codec is summed by all-reduce.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        wire: Wire,
        codec: Codec,
        feedback: ErrorFeedback | None,
        algorithm: Algorithm = "auto",
        seed: int = 0,
    ) -> None:
        self.wire = wire
        self.codec = codec
        self.feedback = feedback
        self.algorithm = algorithm
        self.seed = seed
        self._buffers: dict[str, Tensor] = {}

    def reduce(self, name: str, layout: Layout, values: Tensor, step: int) -> None:
        """Take the mean, in place.

        Args:
            name: of the bucket, the same on all ranks.
            layout: of the values.
            values: float32 [N], contiguous.
            step: number of the step.

        Raises:
            RefusedError: a rank's gradient has NaN or infinity; raised by all ranks. Through
                linear codecs NaN and infinity arrive as what they are.
            MessageError: another rank sent something else.
        """
        self.wire.run(self.rounds(name, layout, values, step))

    def rounds(self, name: str, layout: Layout, values: Tensor, step: int) -> Rounds[None]:
        """Do what :meth:`reduce` does, as a task that others can run beside."""
        world = self.wire.world_size
        if world == 1:
            return
        if self.codec.linear:
            self._linear(name, values)
        elif self.algorithm == "gather" or (self.algorithm == "auto" and world == 2):
            yield from self._gather(name, layout, values, step)
        else:
            yield from self._scatter(name, layout, values, step)

    def _linear(self, name: str, values: Tensor) -> None:
        assert isinstance(self.codec, Cast)
        sent = values.to(self.codec.dtype)
        self.wire.all_reduce(name, sent)
        values.copy_(sent)
        values.div_(self.wire.world_size)
        world = self.wire.world_size
        raw = self.wire.meter.record(name, "reduce")
        raw.raw_bytes += 2 * (world - 1) / world * 4 * values.numel()

    def _gather(self, name: str, layout: Layout, values: Tensor, step: int) -> Rounds[None]:
        wire, phase = self.wire, "gather"
        residual = None
        if self.feedback is not None:
            self.feedback.owner(layout, ())
            residual = self.feedback.worker(layout)
        wire.meter.record(name, phase).raw_bytes += 4 * layout.count * (wire.world_size - 1)
        message, header = self._encode(name, phase, layout.pieces, values, residual, step, 0)
        received = yield Outgoing(name, phase, message, header, self._size([layout.pieces]))
        with wire.meter.timed(name, phase, "decode"):
            for rank in range(wire.world_size):
                self._decode(received, rank, layout.pieces, values, rank > 0)

    def _scatter(self, name: str, layout: Layout, values: Tensor, step: int) -> Rounds[None]:
        wire, world = self.wire, self.wire.world_size
        parts = shares(layout, world, self.codec.align)
        residual = None if self.feedback is None else self.feedback.worker(layout)
        messages, headers = [], []
        for rank, pieces in enumerate(parts):
            message, header = self._encode(name, "scatter", pieces, values, residual, step, rank)
            messages.append(message)
            headers.append(header)
            if header.codec == REFUSAL:
                # Every rank is to hear the reason, not only the owner of that part.
                messages, headers = [message] * world, [header] * world
                break
        raw = 4 * layout.count * (world - 1) / world
        wire.meter.record(name, "scatter").raw_bytes += raw
        wire.meter.record(name, "collect").raw_bytes += raw
        size = self._size(parts)
        received = wire.all_to_all(name, "scatter", messages, headers, size)

        mine = parts[wire.rank]
        with wire.meter.timed(name, "scatter", "decode"):
            for rank in range(world):
                self._decode(received, rank, mine, values, rank > 0)
        message, header = self._encode_sum(name, layout, mine, values, step)
        received = yield Outgoing(name, "collect", message, header, size)
        with wire.meter.timed(name, "collect", "decode"):
            for rank, pieces in enumerate(parts):
                self._decode(received, rank, pieces, values, False, 1.0)

    def _size(self, parts: Sequence[Sequence[Piece]]) -> int | None:
        """Return the bytes of the longest message about some parts, None where they vary."""
        if not self.codec.exact:
            return None
        return HEADER_BYTES + max(
            sum(self.codec.wire_bytes(piece.count) for piece in part) for part in parts
        )

    def _encode_sum(
        self, name: str, layout: Layout, pieces: tuple[Piece, ...], values: Tensor, step: int
    ) -> tuple[Tensor, Header]:
        if self.feedback is None or not pieces:
            return self._encode(name, "collect", pieces, values, None, step, 0)
        begin = pieces[0].at
        owned = self.feedback.owner(layout, pieces)
        return self._encode(name, "collect", pieces, values, owned, step, 0, begin)

    def _encode(
        self,
        name: str,
        phase: str,
        pieces: tuple[Piece, ...],
        values: Tensor,
        residual: Tensor | None,
        step: int,
        slot: int,
        residual_begin: int = 0,
    ) -> tuple[Tensor, Header]:
        """Return a message with some pieces of the values, and its header."""
        wire, codec = self.wire, self.codec
        room = HEADER_BYTES + sum(codec.wire_bytes(piece.count) for piece in pieces)
        # Messages of several buckets may be under way.
        message = self._buffer(f"{name}/{phase}/{slot}", room)
        at = HEADER_BYTES
        count = 0
        reason = None
        with wire.meter.timed(name, phase, "encode"):
            for run in runs(pieces, codec.align):
                first, values_of_run = run[0], _of(run, values)
                size = codec.encode(
                    values_of_run,
                    message[at:room],
                    None if residual is None else _of(run, residual, residual_begin),
                    key=self._key(first.name, phase, step),
                    first=first.begin,
                )
                if size is None:
                    reason = f"the gradient of {_not_finite(run, values)!r} has NaN or infinity"
                    break
                at += size
                count += values_of_run.numel()
        header = wire.header(codec.number, step, name_checksum(name), count, at - HEADER_BYTES)
        if reason is not None:
            header = wire.refusal(message, header, reason)
        return message, header

    def _decode(
        self,
        received: Received,
        rank: int,
        pieces: tuple[Piece, ...],
        values: Tensor,
        add: bool,
        alpha: float | None = None,
    ) -> None:
        payload = received.payload(rank)
        alpha = 1.0 / self.wire.world_size if alpha is None else alpha
        at = 0
        sent, expected = received.headers[rank].count, sum(piece.count for piece in pieces)
        if sent != expected:
            raise MessageError(f"rank {rank} sent {sent} values where {expected} were expected")
        for run in runs(tuple(pieces), self.codec.align):
            try:
                at += self.codec.decode(payload[at:], _of(run, values), add=add, alpha=alpha)
            except ValueError as error:
                raise MessageError(f"rank {rank}, {run[0].name!r}: {error}") from error
        if at != len(payload):
            raise MessageError(f"rank {rank} sent {len(payload) - at} bytes too many")

    def _key(self, name: str, phase: str, step: int) -> int:
        stream = zlib.crc32(f"{name}/{phase}/{self.wire.rank}".encode())
        return step_key(self.seed ^ stream << 32, step)

    def _buffer(self, use: str, size: int) -> Tensor:
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < size:
            buffer = torch.zeros(max(size, _LEAST_BUFFER), dtype=torch.uint8)
            self._buffers[use] = buffer
        return buffer


def _of(run: Sequence[Piece], values: Tensor, begin: int = 0) -> Tensor:
    """Return the values of neighbouring pieces, of a buffer that begins at ``begin``."""
    return values[run[0].at - begin : run[-1].at + run[-1].count - begin]


def _not_finite(run: Sequence[Piece], values: Tensor) -> str:
    """Return the name of the first piece with NaN or infinity; else of what overflowed."""
    for piece in run:
        if not bool(_of([piece], values).isfinite().all()):
            return piece.name
    return run[0].name
