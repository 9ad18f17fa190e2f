"""Who is still there: every rank shows signs of life in the store of the process group.

When an operation fails or times out, the transport knows at best that a connection broke. So each
rank writes, twice a second, a counter and how many collectives it has entered in each group. A rank
whose operation failed reads the counters of the others twice: those that stand still belong to
ranks that are gone; those that advance, without having entered the collective, to ranks that are
busy elsewhere. The first to find out writes its verdict, which the others repeat instead of
blaming whoever gave up before them.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from torch._C._distributed_c10d import PrefixStore, Store

from dqrm.comm.errors import ExchangeError, MissingRanksError

_PERIOD_SECONDS: Final = 0.5
# A rank is gone when it shows no sign of life for so many periods.
_SILENT_PERIODS: Final = 2.5
# Nothing is asked of the store that takes longer, unless the store itself is gone.
_STORE_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sign:
    """What a rank last wrote."""

    beat: int
    entered: dict[str, int]
    left: bool


def margin_seconds(timeout: float) -> float:
    """How much of a time-out is kept for finding out who is missing."""
    return min(4 * _PERIOD_SECONDS, timeout / 4)


def arrive(store: Store, ranks: Sequence[int], own: int, timeout: float, what: str) -> None:
    """Wait until all ``ranks`` have called this with the same store.

    Raises MissingRanksError with those that did not within ``timeout`` seconds.
    """
    keys = {rank: f"arrived/{rank}" for rank in ranks}
    store.set(keys[own], "")
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout))
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in keys.items() if not store.check([key])]
        except RuntimeError:
            raise ExchangeError(f"{what}: {_store_gone(error)}") from error
        if missing:
            raise MissingRanksError(
                f"{what}: {_ranks(missing)} did not arrive within {timeout:g} s", missing
            ) from error


class Presence:
    """This process's signs of life, and what it sees of the others'.

    Args:
        store: of the default group; a connection of its own is opened to it.
        rank: of this process in the world.
        timeout: seconds that operations may take; signs come more often if it is short.
    """

    def __init__(self, store: Store, rank: int, timeout: float) -> None:
        self._store = PrefixStore("presence", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=min(timeout, _STORE_SECONDS)))
        self._rank = rank
        self._period = margin_seconds(timeout) / 4
        self._entered: dict[str, int] = {}
        self._verdicts: dict[str, Callable[[MissingRanksError], None]] = {}
        self._lock = threading.Lock()
        self._beat = 0
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="dqrm-presence", daemon=True)
        self._thread.start()

    def join(self, group: str, on_failure: Callable[[MissingRanksError], None]) -> None:
        """Show the collectives of a group; call back when another rank finds it broken."""
        with self._lock:
            self._entered[group] = 0
            self._verdicts[group] = on_failure

    def enter(self, group: str) -> int:
        """Count one more collective of a group and return its number."""
        number = self._entered[group] + 1
        self._entered[group] = number
        return number

    def leave(self, group: str) -> None:
        """Forget a group."""
        with self._lock:
            self._entered.pop(group, None)
            self._verdicts.pop(group, None)

    @property
    def stopped(self) -> bool:
        """Whether this process has said that it leaves."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Say that this process leaves in good order, and fall silent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        try:
            self._write(left=True)
        except RuntimeError:
            _log.debug("the store is gone already")

    def explain(self, group: str, number: int | None, ranks: Iterable[int], what: str) -> Exception:
        """Say which of ``ranks`` kept a failed operation from ending.

        Takes a little over a second.

        Args:
            group: name of the group.
            number: of the collective; None if the ranks need not have entered one.
            ranks: numbers in the world of those who should have taken part.
            what: begins the message: what failed, and how.
        """
        others = [rank for rank in ranks if rank != self._rank]
        try:
            known = self._verdict(group)
            if known is None:
                missing, reasons = self._look(group, number, others)
                if not missing:
                    return ExchangeError(
                        f"{what}. All ranks are alive and have reached the operation: do they "
                        "call it with the same sizes? DQRM_COMM_CHECK=1 compares them"
                    )
                known = self._publish(group, missing, reasons)
        except RuntimeError as error:
            return ExchangeError(f"{what}. {_store_gone(error)}")
        return MissingRanksError(f"{what}: {known}", known.ranks)

    def _look(
        self, group: str, number: int | None, ranks: Sequence[int]
    ) -> tuple[list[int], list[str]]:
        before = {rank: self._read(rank) for rank in ranks}
        waited = _SILENT_PERIODS * self._period
        time.sleep(waited)
        missing, reasons = [], []
        for rank in ranks:
            sign = self._read(rank)
            entered = sign.entered.get(group, 0)
            if sign.left:
                reason = "has left"
            elif sign.beat == before[rank].beat:
                reason = f"gave no sign of life for {waited:.1f} s: it ended or is stopped"
            elif number is not None and entered < number:
                reason = f"is alive but has entered only {entered} collectives, this is {number}"
            else:
                continue
            missing.append(rank)
            reasons.append(f"rank {rank} {reason}")
        return missing, reasons

    def _publish(
        self, group: str, missing: Sequence[int], reasons: Sequence[str]
    ) -> MissingRanksError:
        text = json.dumps({"ranks": list(missing), "text": "; ".join(reasons)})
        return _parsed(self._store.compare_set(f"verdict/{group}", "", text))

    def _verdict(self, group: str) -> MissingRanksError | None:
        key = f"verdict/{group}"
        return _parsed(self._store.get(key)) if self._store.check([key]) else None

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                self._write()
                for group, on_failure in self._watched():
                    verdict = self._verdict(group)
                    if verdict is not None:
                        self._forget_verdict(group)
                        on_failure(verdict)
            except RuntimeError as error:
                _log.debug("no signs of life any more: %s", error)
                return

    def _forget_verdict(self, group: str) -> None:
        """Stop looking for verdicts on a group."""
        with self._lock:
            self._verdicts.pop(group, None)

    def _watched(self) -> list[tuple[str, Callable[[MissingRanksError], None]]]:
        with self._lock:
            return list(self._verdicts.items())

    def _write(self, left: bool = False) -> None:
        self._beat += 1
        with self._lock:
            entered = dict(self._entered)
        self._store.set(str(self._rank), json.dumps([self._beat, entered, left]))

    def _read(self, rank: int) -> _Sign:
        if not self._store.check([str(rank)]):
            return _Sign(0, {}, False)
        beat, entered, left = json.loads(self._store.get(str(rank)))
        return _Sign(beat, entered, left)


def _parsed(text: bytes) -> MissingRanksError:
    verdict = json.loads(text)
    return MissingRanksError(verdict["text"], verdict["ranks"])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _store_gone(error: Exception) -> str:
    return (
        "The store in which ranks meet does not answer: its host, which is rank 0 or the "
        f"launcher, is gone ({str(error).splitlines()[0]})"
    )
