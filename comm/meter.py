"""How many bytes were exchanged, in how many messages, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

Stage = Literal["encode", "wire", "decode"]


@dataclass
class Traffic:
    """What one rank exchanged under one name in one phase.

    Sent and received bytes are those the collective moves on the wire by its definition: (W - 1) P
    for gathering or scattering messages of P bytes among W ranks, 2 (W - 1) / W P for all-reduce.
    """

    messages: int = 0
    """Rounds: a message to every rank, or one all-reduce."""
    raw_bytes: float = 0
    """What the same collective would have sent in FP32, row numbers as int64."""
    payload_bytes: float = 0
    """Bytes of this rank's own messages, headers included."""
    sent_bytes: float = 0
    received_bytes: float = 0
    encode_seconds: float = 0.0
    wire_seconds: float = 0.0
    decode_seconds: float = 0.0


class Meter:
    """Adds up what a rank exchanges, by name and phase."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.busy_seconds = 0.0
        """That the communication thread worked."""
        self.exposed_seconds = 0.0
        """That callers waited for it."""

    def record(self, name: str, phase: str) -> Traffic:
        """Return what was counted under a name and phase, to be added to."""
        return self.traffic.setdefault((name, phase), Traffic())

    @contextmanager
    def timed(self, name: str, phase: str, stage: Stage) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            record = self.record(name, phase)
            attribute = f"{stage}_seconds"
            setattr(record, attribute, getattr(record, attribute) + time.perf_counter() - begin)

    def total(self) -> Traffic:
        """Return the sum over names and phases."""
        total = Traffic()
        for record in self.traffic.values():
            for field, value in asdict(record).items():
                setattr(total, field, getattr(total, field) + value)
        return total

    @property
    def hidden_seconds(self) -> float:
        """Of the communication thread's work, what nobody waited for."""
        return max(0.0, self.busy_seconds - self.exposed_seconds)

    def report(self) -> dict[str, dict[str, float]]:
        """Return what was counted, by "name/phase", and under "total" their sum and the waits."""
        report = {"/".join(key): dict(asdict(record)) for key, record in self.traffic.items()}
        report["total"] = asdict(self.total()) | {
            "busy_seconds": self.busy_seconds,
            "exposed_seconds": self.exposed_seconds,
            "hidden_seconds": self.hidden_seconds,
        }
        return report

    def reset(self) -> None:
        """Begin anew."""
        self.traffic.clear()
        self.busy_seconds = self.exposed_seconds = 0.0
