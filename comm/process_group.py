"""Joining the processes of a training run.

    from dqrm.comm import process_group

    process_group.init("auto")  # under torchrun, or with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

After that torch.distributed works as always. The names "ccl" and "watched_gloo" are also known to
``torch.distributed.init_process_group`` and ``new_group`` once `register` has been called.
"""

import atexit
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, Final

from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dqrm.comm import agreement, oneccl
from dqrm.comm.backends import Choice, import_ccl_intel, probe_ccl_intel
from dqrm.comm.ccl import CclTransport
from dqrm.comm.errors import ExchangeError, MissingRanksError
from dqrm.comm.gloo import GlooTransport
from dqrm.comm.group import WatchedGroup
from dqrm.comm.presence import Presence, arrive, margin_seconds
from dqrm.comm.transport import Transport

DEFAULT_TIMEOUT_SECONDS: Final = 600.0
_NAMES: Final = {"ccl": "ccl", "gloo": "watched_gloo", "ccl-intel": "ccl"}

_log = logging.getLogger(__name__)
_state: Final[dict[str, Any]] = {
    "presence": None,
    "check": None,
    "timeout": None,
    "joined": 0,
    "keeper": 0,
}


def init(
    backend: str = "auto",
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    check: bool | None = None,
    store: Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> str:
    """Join all ranks in torch.distributed's default process group.

    Args:
        backend: "ccl" (oneCCL), "gloo", "ccl-intel" (Intel's own binding, for an older torch), or
            "auto": oneCCL if every rank can load it, else Gloo, with the reason in the log.
        timeout: seconds after which an operation, or joining, fails on the ranks that wait. The
            error says which ranks did not take part.
        check: compare sizes and dtypes between ranks before every collective; by default, whether
            DQRM_COMM_CHECK=1.
        store: where ranks meet; by default one at MASTER_ADDR and MASTER_PORT.
        rank: of this process; by default RANK.
        world_size: number of processes; by default WORLD_SIZE.

    Returns the backend in use: "ccl", "gloo" or "ccl-intel".

    Raises ValueError for a backend that cannot be used here, MissingRanksError when ranks do not
    arrive.
    """
    if backend not in ("auto", *_NAMES):
        raise ValueError(f"backend={backend!r}: must be auto, {', '.join(_NAMES)}")
    own = int(os.environ["RANK"]) if rank is None else rank
    size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
    base = open_store(own, size, timeout) if store is None else store
    _state["keeper"] = 0 if store is None else None
    # Joining again on the same store must not meet the keys of the first time.
    _state["joined"] += 1
    fresh = PrefixStore(f"dqrm/{_state['joined']}", base)
    choice = _agree(backend, fresh, own, size, timeout)
    if choice.backend == "ccl-intel":
        import_ccl_intel()
    else:
        register()
        _state["check"] = check
    distributed.init_process_group(
        _NAMES[choice.backend],
        store=fresh,
        rank=own,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    return choice.backend


@cache
def register() -> None:
    """Make the backends "ccl" and "watched_gloo" known to torch.distributed."""
    for name, transport in (("ccl", CclTransport), ("watched_gloo", GlooTransport)):
        distributed.Backend.register_backend(
            name, _creator(transport), extended_api=True, devices=["cpu"]
        )


def _agree(backend: str, store: Store, rank: int, size: int, timeout: float) -> Choice:
    """The backend that all ranks can use. Loads oneCCL if it may be the one."""
    problem = ""
    if backend in ("auto", "ccl"):
        try:
            oneccl.load()
        except ImportError as error:
            problem = str(error)
    elif backend == "ccl-intel":
        found = probe_ccl_intel()
        problem = "" if found.usable else found.detail
    if backend != "auto" and problem:
        raise ValueError(f"backend={backend} cannot be used: {problem}")
    store.set(f"problem/{rank}", problem)
    arrive(store, range(size), rank, timeout, "joining the process group")
    if backend != "auto":
        return Choice(backend, "asked for")
    problems = {other: store.get(f"problem/{other}").decode() for other in range(size)}
    broken = {other: text for other, text in problems.items() if text}
    if not broken:
        return Choice("ccl", "oneCCL can be used on every rank")
    first = min(broken)
    reason = (
        f"oneCCL cannot be used on {len(broken)} of {size} ranks; rank {first}: {broken[first]}"
    )
    if rank == 0:
        _log.warning("exchange over Gloo, many times slower for small messages: %s", reason)
    return Choice("gloo", reason)


def _creator(
    transport: Callable[[Store, int, int, float], Transport],
) -> Callable[[Any, Any], WatchedGroup]:
    """What torch calls to make a group over a kind of transport."""

    def create(options: Any, _: Any = None) -> WatchedGroup:
        timeout = _timeout_of(options.timeout, whole_world=not options.global_ranks_in_group)
        count = options.group_size
        ranks = list(options.global_ranks_in_group) or list(range(count))
        whole_world = not options.global_ranks_in_group
        own = ranks[options.group_rank]
        store = options.store
        arrive(store, ranks, own, timeout, f"making the group {options.group_id}")
        presence, owned = _presence_for(store, own, timeout, whole_world)
        # Ranks that wait are told in time who is missing.
        wait = timeout - margin_seconds(timeout)
        try:
            made = transport(PrefixStore("transport", store), options.group_rank, count, wait)
        except RuntimeError as error:
            text = f"making the group {options.group_id} failed ({error})"
            raise presence.explain(options.group_id, None, ranks, text) from error
        check = _state["check"]
        return WatchedGroup(
            made,
            presence,
            ranks,
            options.group_rank,
            options.group_id,
            timeout,
            agreement.wanted() if check is None else check,
            presence.stop if owned else lambda: None,
        )

    return create


def _timeout_of(given: timedelta, whole_world: bool) -> float:
    """Seconds that operations of a group may take: by default as many as in the whole world.

    torch gives groups half an hour unless told otherwise, however long the whole world has.
    """
    if whole_world:
        _state["timeout"] = given.total_seconds()
    elif given == distributed.distributed_c10d.default_pg_timeout:
        return float(_state["timeout"] or given.total_seconds())
    return given.total_seconds()


def _presence_for(
    store: Store, rank: int, timeout: float, whole_world: bool
) -> tuple[Presence, bool]:
    """The signs of life for a group, and whether they end with it."""
    current: Presence | None = _state["presence"]
    if not whole_world and current is not None and not current.stopped:
        return current, False
    presence = Presence(store, rank, timeout, None if _launched() else _state["keeper"])
    atexit.register(presence.stop)
    if whole_world:
        _state["presence"] = presence
    return presence, True


def open_store(rank: int, size: int, timeout: float) -> Store:
    """Connect to the store that torch's launcher keeps, or else rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launched = _launched()
    try:
        return TCPStore(
            host,
            port,
            size,
            is_master=rank == 0 and not launched,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        where = f"the store at {host}:{port} did not answer within {timeout:g} s"
        if launched:
            raise ExchangeError(f"{where}: the launcher, which keeps it, is gone") from error
        raise MissingRanksError(f"{where}: rank 0, which keeps it, did not arrive", [0]) from error


def _launched() -> bool:
    """Whether torch's launcher started this process, and so keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
