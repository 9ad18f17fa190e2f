"""Messages of any size between all ranks, in one round.

Collectives move the same number of bytes from every rank, and messages differ. Ranks could tell
each other their sizes first, at the price of a second round trip, which is most of the time of a
small exchange. Here every channel has a capacity that all ranks know: the size that all messages
have by their codec, or a little more than the largest of late, as headers told. Messages are padded
to it. Where one did not fit, every rank sees that in the headers and the round is repeated with
room for it.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from dqrm.comm.errors import AgreedError
from dqrm.comm.message import (
    HEADER_BYTES,
    REFUSAL,
    Header,
    check_message,
    read_header,
    write_header,
)
from dqrm.comm.meter import Meter
from dqrm.comm.rounds import run_alone

T = TypeVar("T")

_FIRST_CAPACITY = 4096
# Room beyond the largest message, and what of it is given back a round once messages are smaller.
_SLACK = 32
_RETURNED = 256


class RefusedError(AgreedError):
    """A rank had nothing to send; all ranks raise this with its reason."""


@dataclass
class _Channel:
    capacity: int = _FIRST_CAPACITY
    fresh: bool = True
    received: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    staged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def adapt(self, largest: int) -> None:
        """Take in the largest message of a round."""
        wanted = -(-(largest + largest // _SLACK) // 64) * 64
        kept = self.capacity - self.capacity // _RETURNED
        self.capacity = wanted if self.fresh else max(wanted, kept)
        self.fresh = False


@dataclass(frozen=True)
class Received:
    """The messages of all ranks, in their order."""

    buffer: Tensor
    """uint8, what holds them."""
    begins: list[int]
    """Where each payload begins in it."""
    headers: list[Header]

    def payload(self, rank: int) -> Tensor:
        """Return a rank's payload, a view."""
        begin = self.begins[rank]
        return self.buffer[begin : begin + self.headers[rank].size]


@dataclass(frozen=True)
class Outgoing:
    """A message that is to go to every rank."""

    name: str
    """Of the channel; all ranks use the same ones in the same order."""
    phase: str
    """For the meter."""
    message: Tensor
    """uint8, contiguous, the payload behind room for the header; of any length."""
    header: Header
    size: int | None = None
    """Bytes of the longest message of any rank, header included, where all ranks know."""


Rounds = Generator[Outgoing, Received, T]
"""A task that gathers messages from all ranks, and what it returns."""

# Its name changed with torch.
_all_gather: Callable[..., object] = getattr(
    distributed, "all_gather_single", distributed.all_gather_into_tensor
)


class Wire:
    """Exchanges messages over a process group that nothing else uses meanwhile.

    Args:
        group: any process group with all-gather and all-to-all of uint8.
        meter: what counts.
        generation: of the world; messages of another are refused.
    """

    def __init__(self, group: ProcessGroup, meter: Meter, generation: int = 0) -> None:
        self.group = group
        self.meter = meter
        self.generation = generation
        self.rank = distributed.get_rank(group)
        self.world_size = distributed.get_world_size(group)
        self._channels: dict[str, _Channel] = {}
        # Buffers of messages that travel together.
        self._shared = _Channel()

    def header(self, codec: int, step: int, name: int, count: int, size: int) -> Header:
        """Return the header of a message of this rank."""
        largest = HEADER_BYTES + size
        return Header(codec, self.rank, self.generation, step, name, count, size, largest)

    def refusal(self, message: Tensor, expected: Header, reason: str) -> Header:
        """Write a reason as this rank's message and return its header."""
        room = len(message) - HEADER_BYTES
        text = torch.frombuffer(bytearray(reason.encode()[:room]), dtype=torch.uint8)
        message[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        return self.header(REFUSAL, expected.step, expected.name, 0, len(text))

    def run(self, rounds: Rounds[T]) -> T:
        """Run a task and return its result.

        Raises:
            RefusedError: a rank had a reason not to send; every rank raises it.
            MessageError: what came is not what should have come.
        """
        return run_alone(rounds, self.gather)

    def gather(self, outgoing: Sequence[Outgoing]) -> list[Received | AgreedError]:
        """Send some messages to every rank, all in one collective.

        Returns:
            For each, the messages of all ranks, valid until the channel's next; or the reasons
            that ranks had not to send.

        Raises:
            MessageError: what came is not what should have come.
        """
        for one in outgoing:
            write_header(one.message, one.header)
            self.meter.record(one.name, one.phase).payload_bytes += HEADER_BYTES + one.header.size
        results: list[Received | AgreedError | None] = [None] * len(outgoing)
        sizes = [one.size for one in outgoing]
        left = list(range(len(outgoing)))
        while left:
            got = self._gather_once([outgoing[i] for i in left], [sizes[i] for i in left])
            for i, result in zip(left, got, strict=True):
                results[i] = result
                sizes[i] = None
            left = [i for i in left if results[i] is None]
        return [result for result in results if result is not None]

    def _gather_once(
        self, outgoing: Sequence[Outgoing], sizes: Sequence[int | None]
    ) -> list[Received | AgreedError | None]:
        """Return what came, None for messages of which one did not fit."""
        channels = [
            self._channels.setdefault(f"{one.name}/{one.phase}", _Channel()) for one in outgoing
        ]
        capacities = [
            size or channel.capacity for size, channel in zip(sizes, channels, strict=True)
        ]
        whole = sum(capacities)
        # Messages that travel alone have buffers of their own, and stay there till they come again.
        buffers = channels[0] if len(outgoing) == 1 else self._shared
        buffers.received = _grown(buffers.received, whole * self.world_size)
        own = outgoing[0].message[:whole]
        if len(outgoing) > 1 or len(own) < whole:
            buffers.staged = _grown(buffers.staged, whole)
            at = 0
            for one, capacity in zip(outgoing, capacities, strict=True):
                end = min(HEADER_BYTES + one.header.size, capacity)
                buffers.staged[at : at + end] = one.message[:end]
                at += capacity
            own = buffers.staged[:whole]
        received = buffers.received[: whole * self.world_size]
        begin = time.perf_counter()
        _all_gather(received, own, group=self.group)
        seconds = time.perf_counter() - begin
        results: list[Received | AgreedError | None] = []
        at = 0
        for one, channel, capacity in zip(outgoing, channels, capacities, strict=True):
            self._count(one.name, one.phase, capacity)
            self.meter.record(one.name, one.phase).wire_seconds += seconds * capacity / whole
            begins = [rank * whole + at for rank in range(self.world_size)]
            results.append(self._read(channel, received, begins, capacity, one.header))
            at += capacity
        return results

    def all_to_all(
        self,
        name: str,
        phase: str,
        messages: list[Tensor],
        headers: list[Header],
        size: int | None = None,
    ) -> Received:
        """Send a message to each rank; all else as for :class:`Outgoing` and :meth:`run`."""
        channel = self._channels.setdefault(f"{name}/{phase}", _Channel())
        largest = max(header.largest for header in headers)
        sizes = []
        for message, header in zip(messages, headers, strict=True):
            write_header(message, replace(header, largest=largest))
            sizes.append(HEADER_BYTES + header.size)
        self.meter.record(name, phase).payload_bytes += sum(sizes)
        while True:
            capacity = size or channel.capacity
            whole = capacity * self.world_size
            channel.received = _grown(channel.received, whole)
            channel.staged = _grown(channel.staged, whole)
            for rank, message in enumerate(messages):
                sent = min(sizes[rank], capacity)
                channel.staged[rank * capacity : rank * capacity + sent] = message[:sent]
            received = channel.received[:whole]
            with self.meter.timed(name, phase, "wire"):
                distributed.all_to_all_single(received, channel.staged[:whole], group=self.group)
            self._count(name, phase, capacity)
            begins = [rank * capacity for rank in range(self.world_size)]
            result = self._read(channel, received, begins, capacity, headers[self.rank])
            if isinstance(result, AgreedError):
                raise result
            if result is not None:
                return result
            size = None

    def all_reduce(self, name: str, values: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        with self.meter.timed(name, "reduce", "wire"):
            distributed.all_reduce(values, group=self.group)
        record = self.meter.record(name, "reduce")
        size = values.numel() * values.element_size()
        share = 2 * (self.world_size - 1) / self.world_size
        record.messages += 1
        record.payload_bytes += size
        record.sent_bytes += share * size
        record.received_bytes += share * size

    def _count(self, name: str, phase: str, capacity: int) -> None:
        record = self.meter.record(name, phase)
        record.messages += 1
        record.sent_bytes += capacity * (self.world_size - 1)
        record.received_bytes += capacity * (self.world_size - 1)

    def _read(
        self,
        channel: _Channel,
        received: Tensor,
        begins: list[int],
        capacity: int,
        expected: Header,
    ) -> Received | RefusedError | None:
        """Return the checked messages or why there are none, or None where one did not fit."""
        parts = [received[begin : begin + capacity] for begin in begins]
        headers = [read_header(part, rank) for rank, part in enumerate(parts)]
        for part, header in zip(parts, headers, strict=True):
            # Before any of them is believed about sizes.
            if HEADER_BYTES + header.size <= capacity or header.largest <= capacity:
                check_message(part, header, expected)
        largest = max(header.largest for header in headers)
        channel.adapt(largest)
        if largest > capacity:
            return None
        reasons = []
        for part, header in zip(parts, headers, strict=True):
            if header.codec == REFUSAL:
                reason = part[HEADER_BYTES : HEADER_BYTES + header.size].numpy().tobytes()
                reasons.append(f"rank {header.rank}: {reason.decode(errors='replace')}")
        if reasons:
            return RefusedError("; ".join(reasons))
        return Received(received, [begin + HEADER_BYTES for begin in begins], headers)


def _grown(buffer: Tensor, size: int) -> Tensor:
    """Return the buffer, or a larger one in its place where it is too small."""
    if len(buffer) >= size:
        return buffer
    return torch.zeros(size + size // 4, dtype=torch.uint8)
