"""What goes wrong between ranks."""

from collections.abc import Sequence

from torch.distributed import DistBackendError


class AgreedError(RuntimeError):
    """An error that all ranks raise at the same place: communication can go on after it."""


class ExchangeError(DistBackendError):
    """An exchange failed; the group of processes cannot be used any more."""


class MissingRanksError(ExchangeError):
    """Ranks did not take part: they ended, hang, or never arrived.

    Attributes:
        ranks: their numbers in the world, ascending.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class MismatchError(ExchangeError):
    """Ranks called different collectives, or the same with different sizes or dtypes."""
