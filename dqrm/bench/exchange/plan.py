"""What to measure of the exchange, and what came out; both travel between processes as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dqrm.bench.speed.timing import Spread

Part = Literal["rows", "messages", "steps"]
Role = Literal["ours", "peer", "alone"]
PARTS: tuple[Part, ...] = ("rows", "messages", "steps")


@dataclass(frozen=True)
class Plan:
    """What all ranks of a world measure together."""

    parts: tuple[Part, ...] = PARTS
    batches: tuple[int, ...] = (128, 2048)
    """Samples a rank."""
    indices: tuple[str, ...] = ("uniform", "zipf")
    backends: tuple[str, ...] = ("ccl", "gloo")
    """The first is what the world and whole steps use."""
    dim: int = 16
    scale: float = 1.0
    """Share of each table's rows."""
    rounds: int = 25
    seed: int = 0
    turn_seconds: float = 0.03
    ring_lookups: int = 2_000_000
    """Ids in all batches of a rank together; they come again after these."""
    timeout_seconds: float = 120.0
    interface: str | None = None
    """Network interface whose counters are read beside the meter."""

    def write(self, path: Path) -> None:
        """Write for :meth:`read`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Plan":
        """Return what was written."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        lists = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return Plan(**{**plain, **lists})


@dataclass(frozen=True)
class Measured:
    """One contestant of a case."""

    name: str
    role: Role
    wall_seconds: list[float]
    """Of one call on the slowest rank, a number for every round."""
    cpu_seconds: list[float]
    """Of one call, all threads of a rank, the mean over ranks; a number for every round."""
    sent_bytes: float | None = None
    """Of one call and rank, counted where the collective is called; None if nobody counts."""
    formula_bytes: float | None = None
    """The same, calculated."""
    interface_bytes: float | None = None
    """TCP payload of one call and rank as the network interface counted it."""
    header_bytes: float | None = None
    """Ethernet, IP and TCP headers of one call and rank."""
    phases: dict[str, float] = field(default_factory=dict)
    """Median seconds of the parts of one call on rank 0."""

    @property
    def wall(self) -> Spread:
        """Where the turns lay."""
        return Spread.of(self.wall_seconds)

    @property
    def cpu(self) -> Spread:
        """Where their CPU times lay."""
        return Spread.of(self.cpu_seconds)

    def slower_than(self, other: "Measured") -> Spread:
        """Return this one's wall time over the other's, round by round."""
        pairs = zip(self.wall_seconds, other.wall_seconds, strict=True)
        return Spread.of([own / theirs for own, theirs in pairs])


@dataclass
class Case:
    """Contestants that took turns on the same work."""

    part: Part
    processes: int
    backend: str
    """That the world was joined over."""
    batch: int
    """Samples a rank; 0 where there are none."""
    indices: str
    rows: int
    """Rows of all tables."""
    dim: int
    touched_rows: float = 0.0
    """Distinct rows of a rank's batch, the mean."""
    network: str = ""
    """How the network was shaped."""
    measured: list[Measured] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Name the case in the record."""
        parts = [self.part, f"p{self.processes}", self.network]
        parts += [f"b{self.batch}", self.indices] if self.batch else []
        return "/".join(part for part in parts if part)

    def of(self, name: str) -> Measured | None:
        """Return a contestant by name, if it took part."""
        return next((found for found in self.measured if found.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything measured, for JSON."""
        return {"key": self.key, **asdict(self)}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Case":
        """Return what :meth:`as_dict` described."""
        own = {key: value for key, value in plain.items() if key not in ("key", "measured")}
        return Case(**own, measured=[Measured(**each) for each in plain["measured"]])
