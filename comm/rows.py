"""Mean of row-sparse gradients over all ranks: only touched rows travel, each once a rank.

Symbols: W ranks, n rows a rank, U in the union of all ranks', b bytes a row.

    gather  every rank sends its rows to every other                (W-1) n b
    owner   row r goes to rank r % W, which sums and sends it on    (W-1)/W (n + U) b

The union grows slower than W: on Kaggle's tables at batch 2048, U / n is 1.7, 2.9, 4.9 for 2, 4
and 8 ranks, so gathering is cheaper up to four, where it also takes one phase less.

All ranks merge the same messages in the order of the ranks, with FP32 sums, and so get the same
bits. Time and memory follow n and U, never the size of the tables.
"""

import zlib
from typing import Literal

import torch
from torch import Tensor

from dqrm.comm.message import HEADER_BYTES, Header, MessageError, name_checksum
from dqrm.comm.row_codec import Rows
from dqrm.comm.row_residuals import RowResiduals
from dqrm.comm.wire import Outgoing, Received, RefusedError, Rounds, Wire
from dqrm.kernels.rounding import step_key
from dqrm.kernels.row_messages import (
    MalformedRowsError,
    encode_rows,
    merge_messages,
    order_rows,
    row_message_bound,
)
from dqrm.kernels.tables import RowGradient

RowAlgorithm = Literal["auto", "gather", "owner"]

_GATHER_UP_TO = 4
_RAW_KEY_BYTES = 8
_LEAST_BUFFER = 4096


class _RefusedGradient(ValueError):
    """What is to be told to the other ranks in place of a message."""


class RowReducer:
    """Exchanges the rows of one collection of tables, all of them in one message.

    Args:
        wire: to exchange messages on.
        name: of the collection, the same on all ranks.
        rows: of all its tables; row numbers are below it.
        dim: D.
        codec: how rows are sent.
        algorithm: "auto" gathers up to four ranks.
        residuals: keeps what the codec lost of a rank's rows; None forgets it.
        owned: the same of the rows that a rank owns, for the owner algorithm.
        seed: of stochastic rounding.
        threads: of the native loops.
    """

    def __init__(
        self,
        wire: Wire,
        name: str,
        rows: int,
        dim: int,
        codec: Rows,
        algorithm: RowAlgorithm = "auto",
        residuals: RowResiduals | None = None,
        owned: RowResiduals | None = None,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        self.wire, self.name, self.rows, self.dim, self.codec = wire, name, rows, dim, codec
        if algorithm == "auto":
            algorithm = "gather" if wire.world_size <= _GATHER_UP_TO else "owner"
        self.algorithm = algorithm
        self.residuals, self.owned = residuals, owned
        self.seed, self.threads = seed, threads
        self._messages: dict[str, Tensor] = {}
        self._merged: dict[str, RowGradient] = {}
        self._nothing = RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, dim))

    def reduce(self, gradient: RowGradient, step: int, refusal: str | None = None) -> RowGradient:
        """Return the mean over all ranks.

        Args:
            gradient: rows ascending without repeats, int64 [n], and their values, float32 [n, D],
                both contiguous; n may differ between ranks and be 0.
            step: number of the step.
            refusal: why there is no gradient; all ranks raise it.

        Returns:
            The union of the rows, ascending, and their values, valid until the next call.

        Raises:
            RefusedError: a rank's gradient is not finite, or its rows are not such rows; raised by
                all ranks.
            MessageError: another rank sent something else.
        """
        return self.wire.run(self.rounds(gradient, step, refusal))

    def rounds(
        self, gradient: RowGradient, step: int, refusal: str | None = None
    ) -> Rounds[RowGradient]:
        """Do what :meth:`reduce` does, as a task that others can run beside."""
        if self.wire.world_size == 1:
            if refusal is not None:
                raise RefusedError(refusal)
            return gradient
        if self.algorithm == "gather":
            return (yield from self._gather(gradient, step, refusal))
        return (yield from self._owner(gradient, step, refusal))

    def _gather(self, gradient: RowGradient, step: int, refusal: str | None) -> Rounds[RowGradient]:
        wire, phase = self.wire, "gather"
        [(message, header)] = self._messages_of(
            phase, step, gradient, self.residuals, None, 1, refusal
        )
        raw = (wire.world_size - 1) * self._raw_bytes(len(gradient.rows))
        wire.meter.record(self.name, phase).raw_bytes += raw
        received = yield Outgoing(self.name, phase, message, header)
        return self._merge(phase, received, 1 / wire.world_size, False)

    def _owner(self, gradient: RowGradient, step: int, refusal: str | None) -> Rounds[RowGradient]:
        wire, world = self.wire, self.wire.world_size
        pairs = self._messages_of("scatter", step, gradient, self.residuals, None, world, refusal)
        raw = self._raw_bytes(len(gradient.rows)) * (world - 1) / world
        wire.meter.record(self.name, "scatter").raw_bytes += raw
        messages, headers = [message for message, _ in pairs], [header for _, header in pairs]
        received = wire.all_to_all(self.name, "scatter", messages, headers)
        mine = self._merge("scatter", received, 1 / world, True)

        [(message, header)] = self._messages_of("collect", step, mine, self.owned, wire.rank)
        raw = (world - 1) * self._raw_bytes(len(mine.rows))
        wire.meter.record(self.name, "collect").raw_bytes += raw
        received = yield Outgoing(self.name, "collect", message, header)
        return self._merge("collect", received, 1.0, False)

    def _messages_of(
        self,
        phase: str,
        step: int,
        gradient: RowGradient,
        residuals: RowResiduals | None,
        offset: int | None,
        owners: int = 1,
        refusal: str | None = None,
    ) -> list[tuple[Tensor, Header]]:
        """Return a message for each owner, with its header.

        What is wrong with the gradient becomes the message: other ranks wait for one.
        """
        try:
            if refusal is not None:
                raise _RefusedGradient(refusal)
            if len(gradient.rows) and int(gradient.rows[-1]) >= self.rows:
                raise _RefusedGradient(
                    f"row {int(gradient.rows[-1])} is outside the {self.rows} rows of {self.name!r}"
                )
            with self.wire.meter.timed(self.name, phase, "encode"):
                slots, gone = self._place(residuals, gradient)
            if owners == 1 and not len(gone.rows):
                parts: list[tuple[Tensor | None, int]] = [(None, len(gradient.rows))]
            else:
                order, counts = order_rows(gradient, gone, owners)
                sizes = counts.tolist()
                parts = list(zip(torch.split(order, sizes), sizes, strict=True))
            return [
                self._encode(
                    phase, step, gradient, residuals, slots, gone, order, count,
                    owner if owners > 1 else offset,
                )
                for owner, (order, count) in enumerate(parts)
            ]  # fmt: skip
        except ValueError as error:
            message = self._message(f"{phase}/refused", _LEAST_BUFFER)
            header = self._header(step, 0, 0)
            return [(message, self.wire.refusal(message, header, str(error)))] * owners

    def _place(
        self, residuals: RowResiduals | None, gradient: RowGradient
    ) -> tuple[Tensor | None, RowGradient]:
        if residuals is None or self.codec.bits == 32:
            return None, self._nothing
        return residuals.place(gradient)

    def _encode(
        self,
        phase: str,
        step: int,
        gradient: RowGradient,
        residuals: RowResiduals | None,
        slots: Tensor | None,
        gone: RowGradient,
        order: Tensor | None,
        count: int,
        offset: int | None = None,
    ) -> tuple[Tensor, Header]:
        """Return a message with some rows, every W-th from an offset where there is one."""
        codec = self.codec
        room = HEADER_BYTES + row_message_bound(count, self.dim, codec.bits)
        message = self._message(f"{phase}/{offset}", room)
        with self.wire.meter.timed(self.name, phase, "encode"):
            size, bad = encode_rows(
                gradient,
                message[HEADER_BYTES:room],
                bits=codec.bits,
                stride=1 if offset is None else self.wire.world_size,
                offset=0 if offset is None else offset,
                more=gone if order is not None else None,
                order=order,
                slots=slots,
                residual=None if residuals is None or slots is None else residuals.values,
                key=self._key(phase, step) if codec.rounding == "stochastic" else None,
                threads=self.threads,
            )
        if bad is not None:
            raise _RefusedGradient(
                f"the gradient of {self.name!r} has NaN or infinity in row {bad}"
            )
        return message, self._header(step, count, size)

    def _header(self, step: int, count: int, size: int) -> Header:
        return self.wire.header(self.codec.number, step, name_checksum(self.name), count, size)

    def _merge(self, phase: str, received: Received, alpha: float, same: bool) -> RowGradient:
        """Return the sum of the messages, all of whose rows this rank owns where ``same``."""
        wire = self.wire
        strided = phase != "gather"
        messages, total = [], 0
        for rank, header in enumerate(received.headers):
            offset = (wire.rank if same else rank) if strided else 0
            messages.append((received.begins[rank], header.size, header.count, offset))
            if header.count > header.size:
                raise MessageError(
                    f"rank {rank} cannot send {header.count} rows in {header.size} B"
                )
            total += header.count
        with wire.meter.timed(self.name, phase, "decode"):
            try:
                return merge_messages(
                    received.buffer,
                    messages,
                    self._room(phase, total),
                    bits=self.codec.bits,
                    limit=self.rows,
                    stride=wire.world_size if strided else 1,
                    alpha=alpha,
                    threads=self.threads,
                )
            except MalformedRowsError as error:
                raise MessageError(
                    f"rank {error.message} sent rows of {self.name!r} that cannot be read"
                ) from error

    def _raw_bytes(self, count: int) -> int:
        return count * (_RAW_KEY_BYTES + 4 * self.dim)

    def _key(self, phase: str, step: int) -> int:
        stream = zlib.crc32(f"{self.name}/{phase}/{self.wire.rank}".encode())
        return step_key(self.seed ^ stream << 32, step)

    def _message(self, use: str, size: int) -> Tensor:
        message = self._messages.get(use)
        if message is None or len(message) < size:
            message = torch.zeros(max(size * 5 // 4, _LEAST_BUFFER), dtype=torch.uint8)
            self._messages[use] = message
        return message

    def _room(self, phase: str, count: int) -> RowGradient:
        room = self._merged.get(phase)
        if room is None or len(room.rows) < count:
            size = max(1, count * 5 // 4)
            room = RowGradient(torch.empty(size, dtype=torch.int64), torch.empty(size, self.dim))
            self._merged[phase] = room
        return room
