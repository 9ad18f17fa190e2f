"""A collective under way, as torch.distributed hands it to its callers."""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch import Tensor
from torch.distributed import DistBackendError, Work
from torch.futures import Future

from dqrm.comm.transport import Pending


class WatchedWork(Work):
    """Operations of a transport, what remains to do after them, and who explains a failure.

    Args:
        what: the collective, for messages.
        pendings: all must end before the work has ended.
        finish: run once after them, in the thread that first finds them ended: copies results to
            where the caller wants them.
        results: what the future returns.
        explain: turns a transport's error into one that says which ranks are missing.
    """

    def __init__(
        self,
        what: str,
        pendings: Sequence[Pending],
        finish: Sequence[Callable[[], object]],
        results: list[Tensor],
        explain: Callable[[Exception], Exception],
    ) -> None:
        super().__init__()
        self._what = what
        self._pendings = pendings
        self._finish = list(finish)
        self._results = results
        self._explain = explain
        self._future: Future[list[Tensor]] | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the end; results are in place then.

        Args:
            timeout: zero waits for as long as the group allows operations to take. After any other
                an error is raised, and the operation goes on.

        Raises ExchangeError, which names missing ranks, when the operation failed.
        """
        seconds = timeout.total_seconds()
        for pending in self._pendings:
            try:
                ended = pending.wait(seconds if seconds > 0 else None)
            except RuntimeError as error:
                if self._error is None:
                    self._error = self._explain(error)
                raise self._error from error
            if not ended:
                raise DistBackendError(f"{self._what} is still under way after {seconds:g} s")
        self._complete()
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not; after a good end, results are in place."""
        if not all(pending.done() for pending in self._pendings):
            return False
        try:
            return self.wait()
        except DistBackendError:
            return True

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self.is_completed() and self._error is None

    def synchronize(self) -> None:
        """Wait for the end."""
        self.wait()

    def result(self) -> list[Tensor]:
        """The tensors written, after the end."""
        self.wait()
        return self._results

    def get_future(self) -> "Future[list[Tensor]]":
        """A future of the tensors written, which ends without anybody waiting."""
        if self._future is None:
            self._future = Future()
            self._settle_after(list(self._pendings))
        return self._future

    def attend(self) -> None:
        """See to progress from now on, as nobody waits yet."""
        for pending in self._pendings[:1]:
            pending.attend()

    def _settle_after(self, remaining: list[Pending]) -> None:
        if remaining:
            remaining.pop().on_end(lambda: self._settle_after(remaining))
            return
        assert self._future is not None
        try:
            self.wait()
        except Exception as error:
            self._future.set_exception(error)  # type: ignore[arg-type]
        else:
            self._future.set_result(self._results)

    def _complete(self) -> None:
        if not self._finish:
            return
        with self._lock:
            for finish in self._finish:
                finish()
            self._finish.clear()
