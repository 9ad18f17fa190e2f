"""Who is still there: every rank shows signs of life in the store of the process group.

When an operation fails or times out, the transport knows at best that a connection broke. So each
rank writes, twice a second, a counter and how many collectives it has entered in each group. A rank
whose operation failed reads the counters of the others twice: those that stand still belong to
ranks that are gone; those that advance, without having entered the collective, to ranks that are
busy elsewhere. The first to find out writes its verdict, which the others repeat instead of
blaming whoever gave up before them.

The store itself is a process that may end or be stopped, and its client waits for an answer for
ever. So whoever must go on asks it in a thread that may be left behind.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

from torch._C._distributed_c10d import PrefixStore, Store

from dqrm.comm.errors import ExchangeError, MissingRanksError

_PERIOD_SECONDS: Final = 0.5
# A rank is gone when it shows no sign of life for so many periods.
_SILENT_PERIODS: Final = 2.5
# The store is asked for so much longer than a time-out has a margin.
_GRACE_SECONDS: Final = 0.5

_Answer = TypeVar("_Answer")

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
            raise ExchangeError(
                f"{what}: the store in which ranks meet does not answer ({_first_line(error)})"
            ) from error
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
        keeper: the rank whose process keeps the store; None if no rank does.
    """

    def __init__(self, store: Store, rank: int, timeout: float, keeper: int | None = None) -> None:
        self._store = PrefixStore("presence", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._keeper = keeper
        self._margin = margin_seconds(timeout)
        self._period = self._margin / 4
        self._entered: dict[str, int] = {}
        self._watched: dict[str, Callable[[MissingRanksError], None]] = {}
        self._verdicts: dict[str, MissingRanksError] = {}
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
            self._watched[group] = on_failure

    def enter(self, group: str) -> int:
        """Count one more collective of a group and return its number."""
        number = self._entered[group] + 1
        self._entered[group] = number
        return number

    def leave(self, group: str) -> None:
        """Forget a group."""
        with self._lock:
            self._entered.pop(group, None)
            self._watched.pop(group, None)

    @property
    def stopped(self) -> bool:
        """Whether this process has said that it leaves."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Say that this process leaves in good order, and fall silent.

        Where it keeps the store and a group failed, it stays until the others know why.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join(self._margin)
        if self._thread.is_alive():
            _log.debug("the store does not answer")
            return
        try:
            self._ask(lambda: self._write(left=True))
        except RuntimeError as error:
            _log.debug("the store is gone already: %s", error)
        else:
            if self._rank == self._keeper and self._verdicts:
                time.sleep(self._margin)

    def explain(
        self,
        group: str,
        number: int | None,
        ranks: Iterable[int],
        what: str,
        peer: int | None = None,
    ) -> Exception:
        """Say which of ``ranks`` kept a failed operation from ending.

        Takes a little over a second; two where the store does not answer.

        Args:
            group: name of the group.
            number: of the collective; None if the ranks need not have entered one.
            ranks: numbers in the world of those who should have taken part.
            what: begins the message: what failed, and how.
            peer: the one rank that was to take part, where the others only matter to it.
        """
        others = [rank for rank in ranks if rank != self._rank]
        try:
            known = self._ask(lambda: self._find(group, number, others, peer))
        except RuntimeError as error:
            known = self._verdicts.get(group)
            if known is None:
                return self._store_gone(what, error)
        if known is None:
            return ExchangeError(
                f"{what}. All ranks are alive and have reached the operation: do they "
                "call it with the same sizes? DQRM_COMM_CHECK=1 compares them"
            )
        return MissingRanksError(f"{what}: {known}", known.ranks)

    def _find(
        self, group: str, number: int | None, ranks: Sequence[int], peer: int | None
    ) -> MissingRanksError | None:
        """The verdict on a group, by this rank if there is none yet."""
        known = self._verdict(group)
        if known is None:
            missing, reasons = self._look(group, number, ranks, peer)
            # Meanwhile others may have come to theirs, and left.
            known = self._verdict(group)
            if known is None and missing:
                known = self._publish(group, missing, reasons)
        return known

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Ask the store, for as long as a time-out has a margin for it and not for ever.

        Raises RuntimeError when the store is gone or does not answer.
        """
        answer: Future[_Answer] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=run, name="dqrm-presence-question", daemon=True).start()
        try:
            return answer.result(self._margin + _GRACE_SECONDS)
        except TimeoutError as error:
            raise RuntimeError("no answer in time") from error

    def _look(
        self, group: str, number: int | None, ranks: Sequence[int], peer: int | None
    ) -> tuple[list[int], list[str]]:
        before = {rank: self._read(rank) for rank in ranks}
        waited = _SILENT_PERIODS * self._period
        time.sleep(waited)
        gone, behind = {}, {}
        for rank in ranks:
            sign = self._read(rank)
            entered = sign.entered.get(group, 0)
            if sign.left:
                # Those whom a message does not concern may leave.
                if peer not in (None, rank):
                    continue
                gone[rank] = "has left"
            elif sign.beat == before[rank].beat:
                gone[rank] = f"gave no sign of life for {waited:.1f} s: it ended or is stopped"
            elif number is not None and entered < number:
                behind[rank] = (
                    f"is alive but has entered only {entered} collectives, this is {number}"
                )
        if peer is not None:
            behind[peer] = "is alive but has not called its side of it"
            gone = {peer: gone[peer]} if peer in gone else gone
        # Who is behind may itself wait for one that is gone.
        missing = gone or behind
        return list(missing), [f"rank {rank} {reason}" for rank, reason in missing.items()]

    def _publish(
        self, group: str, missing: Sequence[int], reasons: Sequence[str]
    ) -> MissingRanksError:
        text = json.dumps({"ranks": list(missing), "text": "; ".join(reasons)})
        verdict = _parsed(self._store.compare_set(f"verdict/{group}", "", text))
        self._verdicts[group] = verdict
        return verdict

    def _verdict(self, group: str) -> MissingRanksError | None:
        if group not in self._verdicts:
            key = f"verdict/{group}"
            if not self._store.check([key]):
                return None
            self._verdicts[group] = _parsed(self._store.get(key))
        return self._verdicts[group]

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                self._write()
                for group, on_failure in self._groups():
                    verdict = self._verdict(group)
                    if verdict is not None:
                        with self._lock:
                            self._watched.pop(group, None)
                        on_failure(verdict)
            except RuntimeError as error:
                _log.debug("no signs of life any more: %s", error)
                return

    def _groups(self) -> list[tuple[str, Callable[[MissingRanksError], None]]]:
        with self._lock:
            return list(self._watched.items())

    def _write(self, left: bool = False) -> None:
        self._beat += 1
        with self._lock:
            entered = dict(self._entered)
        self._store.set(str(self._rank), json.dumps([self._beat, entered, left]))

    def _store_gone(self, what: str, error: Exception) -> ExchangeError:
        text = f"{what}. The store in which ranks meet does not answer ({_first_line(error)})"
        if self._keeper is None:
            return ExchangeError(f"{text}: its host, such as the launcher, is gone or stopped")
        reason = f"rank {self._keeper}, which keeps it, ended or is stopped"
        return MissingRanksError(f"{text}: {reason}", [self._keeper])

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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
