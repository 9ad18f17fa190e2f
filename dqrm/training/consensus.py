"""What single processes wish for and all then do after the same step: to stop, or to save."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dqrm.training.world import World

if TYPE_CHECKING:
    from dqrm.comm.exchange import Exchange


class Wishes(NamedTuple):
    """What one process wants, or all of them together."""

    stop: bool = False
    """Save and return: a signal came."""
    save: bool = False
    """Save: the time is due."""


class Consensus:
    """The wishes of all ranks; one rank's wish is granted by all.

    Args:
        world: of the ranks.
        wishes: returns those of this process, now.
    """

    def __init__(self, world: World, wishes: Callable[[], Wishes]) -> None:
        self._world = world
        self._wishes = wishes
        self.granted = Wishes()
        """What all do after this step."""

    def ask_alone(self) -> None:
        """Grant this process's wishes, in a world of one."""
        self.granted = self._wishes()

    def start(self, loss: float, exchange: "Exchange | None" = None) -> Callable[[], float]:
        """Begin to ask all ranks, with their losses; what is returned waits and sums these.

        Args:
            loss: of this rank.
            exchange: of gradients, to ask along with them.
        """
        numbers = [loss, *map(float, self._wishes())]
        wait = self._world.start_sum(numbers) if exchange is None else exchange.sum(numbers).wait

        def settle() -> float:
            total, stop, save = wait()
            self.granted = Wishes(stop > 0, save > 0)
            return total

        return settle
