"""The foundation of a process group: its names, its messages between two ranks, its failures."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from dqrm.comm import agreement
from dqrm.comm.agreement import Call
from dqrm.comm.buffers import bytes_of, checked, listed
from dqrm.comm.errors import MismatchError
from dqrm.comm.presence import Presence
from dqrm.comm.reduction import Op
from dqrm.comm.transport import Pending, Transport
from dqrm.comm.work import WatchedWork

Finish = Callable[[], object]
# torch's type stubs tell each form of a collective apart, which the methods here do themselves.
_ProcessGroup: Any = distributed.ProcessGroup


class Started:
    """Operations started for one collective, and what remains to do after them."""

    def __init__(self) -> None:
        self.pendings: list[Pending] = []
        self.finish: list[Finish] = []


class GroupBase(_ProcessGroup):  # type: ignore[misc]
    """The ranks of a group, joined by a transport.

    Args:
        transport: among exactly these ranks.
        presence: where ranks show that they are alive.
        ranks: their numbers in the world, in the order of the group.
        rank: of this process in the group.
        name: of the group, the same on all its ranks.
        timeout: seconds that operations may take, for messages.
        check: compare calls between ranks before each collective.
        on_shutdown: called when the group ends.
    """

    def __init__(
        self,
        transport: Transport,
        presence: Presence,
        ranks: Sequence[int],
        rank: int,
        name: str,
        timeout: float,
        check: bool,
        on_shutdown: Callable[[], None],
    ) -> None:
        super().__init__(rank, len(ranks))
        self._transport = transport
        self._presence = presence
        self._ranks = list(ranks)
        self._own = rank
        self._count = len(ranks)
        self._key = name
        self._name = name
        self._description = "undefined"
        self._timeout = timeout
        self._check = check
        self._on_shutdown = on_shutdown
        self._failure: Exception | None = None
        self._failure_lock = threading.Lock()
        presence.join(name, self._fail)

    # Between two ranks.

    def send(self, tensors: Any, peer: int, tag: int) -> WatchedWork:
        """Send a tensor to one rank."""
        [tensor] = listed(tensors)
        self._raise_failure()
        pending = self._transport.send(bytes_of(tensor), peer, tag)
        return self._message(f"send to rank {self._ranks[peer]}", peer, pending, [], [tensor])

    def recv(self, tensors: Any, peer: int, tag: int) -> WatchedWork:
        """Receive a tensor from one rank."""
        [tensor] = listed(tensors)
        self._raise_failure()
        whole = tensor.contiguous()
        pending = self._transport.receive(bytes_of(whole), peer, tag)
        finish = [] if whole is tensor else [lambda: tensor.copy_(whole)]
        what = f"receive from rank {self._ranks[peer]}"
        return self._message(what, peer, pending, finish, [tensor])

    def recv_anysource(self, tensors: Any, tag: int) -> WatchedWork:
        """Not offered: a transport must know who sends."""
        raise NotImplementedError("recv without a source: name the rank to receive from")

    # The group.

    def barrier(self, opts: Any = None, *_: Any) -> WatchedWork:
        """Wait until all ranks have come here."""
        token = torch.zeros(1, dtype=torch.uint8)
        number = self._enter(lambda: self._alike("barrier", [token], ""), "barrier", [])
        started = Started()
        started.pendings.append(self._transport.all_reduce(token, Op.MAX))
        return self._work("barrier", number, started, [token], opts)

    def shutdown(self) -> None:
        """End the group in good order."""
        self._presence.leave(self._name)
        self._transport.close()
        self._on_shutdown()

    def abort(self) -> None:
        """Fail whatever is under way."""
        self._transport.abort("the group was aborted")

    def name(self) -> str:
        """The transport's name."""
        return self._transport.name

    getBackendName = name

    def getGroupName(self) -> str:
        """The group's name, by which compiled collectives find it."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Called by torch after making the group, with the name it was made with."""
        self._name = name

    def getGroupDesc(self) -> str:
        """What the group is for."""
        return self._description

    def setGroupDesc(self, description: str) -> None:
        """Say what the group is for."""
        self._description = description

    # For the collectives.

    def _enter(self, call: Callable[[], Call], name: str, tensors: Sequence[Tensor]) -> int:
        """Begin a collective: count it, and in the checking mode compare it between ranks."""
        self._raise_failure()
        checked(name, tensors)
        number = self._presence.enter(self._key)
        if self._check:
            try:
                agreement.check(self._transport, call(), self._ranks)
            except RuntimeError as error:
                if isinstance(error, MismatchError):
                    raise
                raise self._explain(error, name, number) from error
        return number

    def _work(
        self, name: str, number: int, started: Started, results: list[Tensor], opts: Any
    ) -> WatchedWork:
        what = f"{name} {number}"
        work = WatchedWork(
            what,
            started.pendings,
            started.finish,
            results,
            lambda error: self._explain(error, name, number),
        )
        if getattr(opts, "asyncOp", True):
            work.attend()
        return work

    def _message(
        self,
        what: str,
        peer: int,
        pending: Pending,
        finish: Sequence[Finish],
        results: list[Tensor],
    ) -> WatchedWork:
        work = WatchedWork(
            what,
            [pending],
            finish,
            results,
            lambda error: self._explain(error, what, None, self._ranks[peer]),
        )
        work.attend()
        return work

    def _explain(
        self, error: Exception, what: str, number: int | None, peer: int | None = None
    ) -> Exception:
        """The reason for a failure, found once for the whole group."""
        with self._failure_lock:
            if self._failure is None:
                # Gloo goes on with general advice.
                reason = str(error).strip().split("\n", 1)[0].split(". ", 1)[0]
                place = f"{what} {number}" if number is not None else what
                over = self.name().removeprefix("watched_")
                text = f"{place} over {over} failed (time-out {self._timeout:g} s; {reason})"
                self._failure = self._presence.explain(self._key, number, self._ranks, text, peer)
                self._transport.abort(str(self._failure))
            return self._failure

    def _fail(self, verdict: Exception) -> None:
        """Another rank found the group broken."""
        self._transport.abort(str(verdict))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _alike(self, what: str, tensors: Sequence[Tensor], detail: str) -> Call:
        """A call in which all ranks have tensors of the same sizes."""
        count = sum(tensor.numel() for tensor in tensors)
        counts = [count] * self._count
        return Call(described(what, tensors[0] if tensors else None, detail), counts, counts)


def described(name: str, tensor: Tensor | None, detail: str) -> str:
    """Name a collective with what must be the same on all ranks."""
    parts = [name]
    if detail:
        parts.append(f"({detail})")
    if tensor is not None:
        parts.append(f"of {str(tensor.dtype).removeprefix('torch.')}")
    return " ".join(parts)
