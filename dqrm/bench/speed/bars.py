"""How many times faster than whom we want to be, and whether we are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OURS_TRAINED_AT_4_BITS = "dqrm INT4"


@dataclass(frozen=True)
class Bar:
    """A ratio of CPU time to reach.

    The fastest of ``against`` is what counts; by default that of all peers.
    """

    group: str
    at_least: float
    batch: int | None = None
    """None holds at every batch size."""
    dims: tuple[int, ...] = (16,)
    against: tuple[str, ...] = ()
    ours: tuple[str, ...] = (OURS_TRAINED_AT_4_BITS,)
    goal: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured."""

    ours: str
    against: str
    ratio: float
    at_least: float
    goal: float | None

    @property
    def met(self) -> bool:
        """Whether the bar is reached."""
        return self.ratio >= self.at_least


_FBGEMM_SGD = ("FBGEMM EXACT_SGD",)
_ANY_WIDTH = (16, 64)
_STEPS = (OURS_TRAINED_AT_4_BITS, "dqrm int8")
_BOTH = (OURS_TRAINED_AT_4_BITS, "dqrm FP32")

BARS = (
    Bar("train", 2.0, batch=2048, ours=_STEPS, goal=2.5),
    Bar("train", 5.0, batch=128, ours=_STEPS),
    # A surcharge of at most 3 % for training at 4 bits.
    Bar("train", 1 / 1.03, against=("dqrm FP32",)),
    Bar("sgd", 3.0, batch=2048, dims=_ANY_WIDTH, against=_FBGEMM_SGD, ours=_BOTH),
    Bar("sgd", 8.0, batch=128, dims=_ANY_WIDTH, against=_FBGEMM_SGD, ours=_BOTH),
    Bar("adagrad", 10.0, batch=2048, ours=_BOTH),
    Bar("adam", 7.0, batch=2048, ours=_BOTH),
    Bar("packed", 1.3, batch=2048, against=("torch 4-bit",)),
    Bar("packed", 2.0, batch=2048, against=("FBGEMM IntNBit",)),
    Bar("packed", 4.0, batch=128, against=("FBGEMM IntNBit",)),
    Bar("packed-one-table", 0.9, against=("random gather",)),
    Bar(
        "interaction",
        5.0,
        batch=2048,
        against=("torch.compile FP32", "torch.compile BF16"),
        ours=("dqrm",),
    ),
    Bar("mlp", 1.5, batch=2048, ours=(*_STEPS, "dqrm BF16"), goal=2.0),
)
"""Where each comes from: the limits of the hardware and what plain C++ loops reached on it."""


def verdicts(
    group: str, batch: int, dim: int, cpu_seconds: Mapping[str, float], peers: Sequence[str]
) -> list[Verdict]:
    """Return every bar of a group that was measured.

    Args:
        group: name of the group.
        batch: batch size measured at.
        dim: width of the tables.
        cpu_seconds: median of each contestant that ran.
        peers: names of the peers among them.
    """
    found = []
    for bar in BARS:
        if bar.group != group or bar.batch not in (None, batch) or dim not in bar.dims:
            continue
        rivals = [
            name
            for name in (cpu_seconds if bar.against else peers)
            # The limit goes by one name, whatever its look-ahead.
            if not bar.against or name in bar.against or name.partition(",")[0] in bar.against
        ]
        for ours in bar.ours:
            if ours not in cpu_seconds or not rivals:
                continue
            best = min(rivals, key=cpu_seconds.__getitem__)
            ratio = cpu_seconds[best] / cpu_seconds[ours]
            found.append(Verdict(ours, best, ratio, bar.at_least, bar.goal))
    return found
