"""What is spent of a budget of bytes, and on what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqrm.compress.signals.allocate import Candidate, allocate


@dataclass(frozen=True)
class Budget:
    """Bytes that matrices or tables may take together; one of its fields is None."""

    ratio: float | None
    """Times that they shall be smaller than in FP32, at least."""
    like: int | None
    """Option that would take as many, had all of them this one."""

    def bytes(self, candidates: Mapping[str, Sequence[Candidate]], fp32_bytes: int) -> int:
        """Return them.

        Args:
            candidates: of each matrix or table, in the order of the options.
            fp32_bytes: of all of them as they are.
        """
        if self.like is not None:
            return sum(options[self.like].cost for options in candidates.values())
        assert self.ratio is not None
        return int(fp32_bytes / self.ratio)


@dataclass(frozen=True)
class Allocated:
    """What an allocation came to."""

    chosen: dict[str, int]
    """Option of each matrix or table, by its name."""
    candidates: Mapping[str, Sequence[Candidate]]
    """Of each, in the order of the options."""
    fp32_bytes: int
    """Of all of them as they are."""
    budget: int
    """Bytes that the choice takes at most."""

    def total(self, chosen: Mapping[str, int]) -> Candidate:
        """Bytes and expected loss of a choice."""
        taken = [self.candidates[name][option] for name, option in chosen.items()]
        return Candidate(sum(c.cost for c in taken), sum(c.loss for c in taken))

    def as_tree(self) -> dict[str, dict[str, Any]]:
        """Return, by name, the chosen option, and bytes and expected loss of all, as JSON."""
        return {
            name: {
                "chosen": chosen,
                "bytes": [candidate.cost for candidate in self.candidates[name]],
                "expected_loss": [candidate.loss for candidate in self.candidates[name]],
            }
            for name, chosen in self.chosen.items()
        }

    def uniform(self, option: int) -> Candidate:
        """Bytes and expected loss if all had one option."""
        return self.total(dict.fromkeys(self.chosen, option))

    def best_uniform(self) -> int | None:
        """The option with the least expected loss that the budget pays for in all of them."""
        options = range(len(next(iter(self.candidates.values()))))
        fitting = [option for option in options if self.uniform(option).cost <= self.budget]
        return min(fitting, key=lambda option: self.uniform(option).loss, default=None)


def spend(
    candidates: Mapping[str, Sequence[Candidate]], fp32_bytes: int, budget: Budget
) -> Allocated:
    """Choose for each matrix or table, at the least expected loss.

    Args:
        candidates: of each, in the order of the options.
        fp32_bytes: of all of them as they are.
        budget: bytes that they may take.

    Raises:
        ValueError: even the smallest options take more, or an expected loss is not finite.
    """
    most = budget.bytes(candidates, fp32_bytes)
    chosen = allocate(list(candidates.values()), most)
    return Allocated(dict(zip(candidates, chosen, strict=True)), candidates, fp32_bytes, most)
