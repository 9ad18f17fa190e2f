"""The checking mode: ranks compare what they are about to do before they do it.

Transports trust their callers: with different sizes one rank errs, or waits, or silently gets
wrong values. With DQRM_COMM_CHECK=1 every collective is preceded by a small exchange of what each
rank wants, and all ranks raise the same error when it does not fit together.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dqrm.comm.errors import MismatchError
from dqrm.comm.transport import Transport

VARIABLE: Final = "DQRM_COMM_CHECK"
_TEXT_BYTES: Final = 96


@dataclass(frozen=True)
class Call:
    """What one rank is about to do."""

    what: str
    """Collective, dtype, and whatever else must be the same everywhere."""
    sends: Sequence[int]
    """Values for each rank of the group."""
    receives: Sequence[int]
    """Values expected from each rank of the group."""

    def __str__(self) -> str:
        if len(set(self.sends)) == 1 == len(set(self.receives)):
            if self.sends[0] == self.receives[0]:
                return f"{self.what}, {self.sends[0]} values"
            return f"{self.what}, {self.sends[0]} values to and {self.receives[0]} from each rank"
        return f"{self.what}, values sent {list(self.sends)}, received {list(self.receives)}"


def wanted() -> bool:
    """Whether the environment asks for the checking mode."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def check(transport: Transport, call: Call, ranks: Sequence[int]) -> None:
    """Compare the calls of all ranks; ``ranks`` are their numbers in the world.

    Raises MismatchError, on every rank, when they do not fit together.
    """
    own = _encoded(call)
    gathered = torch.empty(len(ranks) * own.numel(), dtype=torch.uint8)
    transport.all_gather(gathered, own, [own.numel()] * len(ranks)).wait(None)
    calls = [_decoded(row, len(ranks)) for row in gathered.view(len(ranks), -1)]
    problem = _problem(calls, ranks)
    if problem is not None:
        said = "; ".join(f"rank {rank}: {call}" for rank, call in zip(ranks, calls, strict=True))
        raise MismatchError(f"ranks do not agree: {problem}. {said}")


def _problem(calls: Sequence[Call], ranks: Sequence[int]) -> str | None:
    for rank, call in zip(ranks, calls, strict=True):
        if call.what != calls[0].what:
            return f"rank {ranks[0]} calls {calls[0].what}, but rank {rank} {call.what}"
    for i, sender in enumerate(calls):
        for j, receiver in enumerate(calls):
            sent, expected = sender.sends[j], receiver.receives[i]
            if sent != expected:
                return (
                    f"in {sender.what} rank {ranks[i]} has {sent} values for rank {ranks[j]}, "
                    f"which expects {expected}"
                )
    return None


def _encoded(call: Call) -> Tensor:
    text = call.what.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    counts = torch.tensor([*call.sends, *call.receives], dtype=torch.int64)
    return torch.cat(
        [torch.frombuffer(bytearray(text), dtype=torch.uint8), counts.view(torch.uint8)]
    )


def _decoded(row: Tensor, size: int) -> Call:
    text = bytes(row[:_TEXT_BYTES].tolist()).decode(errors="replace").rstrip()
    counts = row[_TEXT_BYTES:].clone().view(torch.int64).tolist()
    return Call(text, counts[:size], counts[size:])
