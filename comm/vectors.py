"""All-to-all of lists of integers and of quantized vectors, another number for each rank.

    ranks ask       integers   rows of a table, say; only the sender knows how many
    ranks answer    vectors    one for each integer, so that both sides know how many

Vectors go without padding: a message is as long as its vectors. Integers are padded to the longest
list (see dqrm.comm.wire), which saves a round trip.

What is lost of a vector is forgotten: it belongs to a place in a batch that does not come again.
Rounding to nearest loses least of a value that is used once, such as an activation. Stochastic
rounding is right on average, which matters where values are added up over steps, as gradients are.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from dqrm.comm.message import (
    HEADER_BYTES,
    REFUSAL,
    Header,
    MessageError,
    check_message,
    name_checksum,
    read_header,
    write_header,
)
from dqrm.comm.row_codec import Rows
from dqrm.comm.wire import RefusedError, Wire
from dqrm.kernels.rounding import step_key
from dqrm.kernels.row_codecs import dequantize_rows, quantize_rows
from dqrm.kernels.row_codecs_reference import code_bytes

_INTEGERS = 1
"""Codec number of lists of int32."""
_SCALE_BYTES = 2


def exchange_integers(
    wire: Wire, name: str, lists: Sequence[Tensor], step: int, refusal: str | None = None
) -> list[Tensor]:
    """Send each rank a list and return those received, int32.

    Args:
        wire: to send over.
        name: of the channel, the same on all ranks.
        lists: int32 [n], one for each rank.
        step: number of the step.
        refusal: why there is nothing to send; all ranks raise it.

    Raises:
        RefusedError: a rank refused.
        MessageError: another rank sent something else.
    """
    checksum = name_checksum(name)
    expected = wire.header(_INTEGERS, step, checksum, 0, 0)
    messages, headers = [], []
    for numbers in lists:
        message = torch.empty(HEADER_BYTES + max(4 * len(numbers), 512), dtype=torch.uint8)
        if refusal is not None:
            headers.append(wire.refusal(message, expected, refusal))
        else:
            size = 4 * len(numbers)
            message[HEADER_BYTES : HEADER_BYTES + size].view(torch.int32).copy_(numbers)
            headers.append(wire.header(_INTEGERS, step, checksum, len(numbers), size))
        messages.append(message)
    sent = sum(4 * len(numbers) for rank, numbers in enumerate(lists) if rank != wire.rank)
    wire.meter.record(name, "integers").raw_bytes += 2 * sent
    received = wire.all_to_all(name, "integers", messages, headers)
    # A payload may begin at any address; a copy of it does not.
    return [received.payload(rank).clone().view(torch.int32) for rank in range(wire.world_size)]


class VectorExchange:
    """Sends vectors of one width to all ranks.

    Args:
        wire: to send over.
        name: of what is sent, the same on all ranks.
        dim: D.
        codec: how vectors are sent.
        seed: of stochastic rounding.
    """

    def __init__(self, wire: Wire, name: str, dim: int, codec: Rows, seed: int = 0) -> None:
        self.wire, self.name, self.dim, self.codec, self.seed = wire, name, dim, codec, seed

    def message_bytes(self, count: int) -> int:
        """Return the bytes of a message of ``count`` vectors, its header included."""
        bits = self.codec.bits
        scale = _SCALE_BYTES if bits < 16 else 0
        return HEADER_BYTES + count * (code_bytes(self.dim, bits) + scale)

    def send(
        self, values: Tensor, counts: Sequence[int], expected: Sequence[int], step: int
    ) -> Tensor:
        """Send vectors and return those received.

        Args:
            values: float32 [sum(counts), D], contiguous; those for rank 0 first.
            counts: vectors for each rank.
            expected: vectors that each rank sends here; ``counts`` over there.
            step: number of the step.

        Returns:
            float32 [sum(expected), D], those of rank 0 first.

        Raises:
            RefusedError: a rank has NaN or infinity to send; all ranks raise it.
            MessageError: another rank sent something else.
        """
        wire, meter = self.wire, self.wire.meter
        sizes = [self.message_bytes(count) for count in counts]
        coming = [self.message_bytes(count) for count in expected]
        with meter.timed(self.name, "vectors", "encode"):
            sent = self._encoded(values, counts, sizes, step)
        received = torch.empty(sum(coming), dtype=torch.uint8)
        with meter.timed(self.name, "vectors", "wire"):
            distributed.all_to_all_single(received, sent, coming, sizes, group=wire.group)
        record = meter.record(self.name, "vectors")
        record.messages += 1
        record.payload_bytes += sum(sizes)
        record.sent_bytes += sum(sizes) - sizes[wire.rank]
        record.received_bytes += sum(coming) - coming[wire.rank]
        record.raw_bytes += 4 * self.dim * (sum(counts) - counts[wire.rank])
        with meter.timed(self.name, "vectors", "decode"):
            return self._decoded(received, expected, coming, step)

    def _header(self, step: int, count: int, size: int) -> Header:
        return self.wire.header(self.codec.number, step, name_checksum(self.name), count, size)

    def _encoded(
        self, values: Tensor, counts: Sequence[int], sizes: Sequence[int], step: int
    ) -> Tensor:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        messages = torch.split(whole, list(sizes))
        bad = None
        for rank, part in enumerate(torch.split(values, list(counts))):
            if self._encode(part, messages[rank][HEADER_BYTES:], rank, step) is not None:
                bad = rank
        for message, count in zip(messages, counts, strict=True):
            header = self._header(step, count, len(message) - HEADER_BYTES)
            if bad is not None:
                reason = f"{self.name!r} has NaN or infinity in a vector for rank {bad}"
                header = self.wire.refusal(message, header, reason)
            write_header(message, header)
        return whole

    def _encode(self, values: Tensor, payload: Tensor, to: int, step: int) -> int | None:
        """Write vectors and return the first that is not finite, or None."""
        bits = self.codec.bits
        if bits >= 16:
            payload.view(torch.float32 if bits == 32 else torch.bfloat16).copy_(values.view(-1))
            return None
        codes = len(values) * code_bytes(self.dim, bits)
        key = None
        if self.codec.rounding == "stochastic":
            stream = zlib.crc32(f"{self.name}/{self.wire.rank}/{to}".encode())
            key = step_key(self.seed ^ stream << 32, step)
        return quantize_rows(values, payload[:codes], payload[codes:], bits=bits, key=key)

    def _decoded(
        self, received: Tensor, counts: Sequence[int], sizes: Sequence[int], step: int
    ) -> Tensor:
        expected = self._header(step, 0, 0)
        values = torch.empty(sum(counts), self.dim)
        parts = torch.split(values, list(counts))
        bits, reasons = self.codec.bits, []
        for rank, message in enumerate(torch.split(received, list(sizes))):
            header = read_header(message, rank)
            check_message(message, header, expected)
            payload = message[HEADER_BYTES : HEADER_BYTES + header.size]
            if header.codec == REFUSAL:
                # An empty message has no room for the reason.
                reason = payload.numpy().tobytes().decode(errors="replace")
                reasons.append(f"rank {rank}: {reason or f'refused to send {self.name!r}'}")
                continue
            if header.count != counts[rank] or HEADER_BYTES + header.size != sizes[rank]:
                raise MessageError(
                    f"rank {rank} sent {header.count} vectors where {counts[rank]} were expected"
                )
            if bits >= 16:
                dtype = torch.float32 if bits == 32 else torch.bfloat16
                parts[rank].view(-1).copy_(payload.view(dtype))
            else:
                codes = len(parts[rank]) * code_bytes(self.dim, bits)
                dequantize_rows(payload[:codes], payload[codes:], parts[rank], bits=bits)
        if reasons:
            raise RefusedError("; ".join(reasons))
        return values
