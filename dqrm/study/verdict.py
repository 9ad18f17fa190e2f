"""Who wins, by a rule that is stated and applied to every pair in the same way.

The rule, for the differences of a test metric between an arm and its rival, seed by seed:

- The 95 % interval of their mean (Student's t) leaves out 0: the arm is better, or worse.
- It holds 0 and lies within the margin, a difference too small to matter: as good.
- It holds 0 and reaches beyond the margin: undecided; more seeds would tell.
"""

from dataclasses import dataclass
from typing import Literal

from dqrm.study.statistics import Estimate

Ruling = Literal["better", "worse", "as good", "undecided", "one seed"]
Metric = Literal["auc", "log_loss"]

MARGIN = 0.001
"""Of AUC, and of log loss in nats."""

METRICS: dict[Metric, str] = {"auc": "AUC", "log_loss": "log loss"}

RULE = (
    "Rule: differences to the rival are taken seed by seed. An arm is better or worse where the "
    "95 % interval of their mean (Student's t) leaves out 0; as good where the interval holds 0 "
    f"and lies within {MARGIN} on either side; otherwise undecided. Intervals are not widened for "
    "the number of comparisons."
)


@dataclass(frozen=True)
class Verdict:
    """An arm beside its rival in one metric."""

    arm: str
    rival: str
    metric: Metric
    difference: Estimate
    """Arm less rival."""

    @property
    def ruling(self) -> Ruling:
        """What the rule says of the arm."""
        if self.difference.half_width is None:
            return "one seed"
        if abs(self.difference.mean) > self.difference.half_width:
            return "better" if self._gain > 0 else "worse"
        extreme = max(abs(self.difference.low), abs(self.difference.high))
        return "as good" if extreme <= MARGIN else "undecided"

    @property
    def sentence(self) -> str:
        """The ruling in words, with the figures behind it."""
        name, figures = METRICS[self.metric], difference_text(self.difference)
        arm, rival, ruling = self.arm, self.rival, self.ruling
        if ruling == "one seed":
            return f"{arm} beside {rival}: {name} {figures} with one seed, which proves nothing."
        if ruling in ("better", "worse"):
            winner, loser = (arm, rival) if ruling == "better" else (rival, arm)
            little = " by little" if abs(self.difference.mean) < MARGIN else ""
            return f"{winner} wins over {loser}{little}: {name} of {arm} differs by {figures}."
        if ruling == "as good":
            return (
                f"{rival} is as good as {arm}: the difference in {name}, {figures}, is not "
                f"significant and below {MARGIN}."
            )
        ahead, behind = (arm, rival) if self._gain > 0 else (rival, arm)
        return (
            f"Undecided: {ahead} is ahead of {behind}, but {name} of {arm} differs by {figures}, "
            f"which is not significant; the {len(self.difference.values)} seeds do not exclude "
            f"{MARGIN}."
        )

    @property
    def _gain(self) -> float:
        """By how much the arm is better on average."""
        return self.difference.mean if self.metric == "auc" else -self.difference.mean


def difference_text(difference: Estimate) -> str:
    """``+0.0012 [-0.0003, +0.0027]``."""
    if difference.half_width is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
