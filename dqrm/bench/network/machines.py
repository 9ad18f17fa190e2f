"""Network namespaces as machines, joined by a switch whose cables have a rate.

    with machines(2, "1gbit") as made:
        subprocess.run([*made[1].enter, "ping", "-c", "1", made[0].address])

    machine 0                    switch                     machine 1
    eth0 10.77.0.1 -- cable -- port0 = bridge = port1 -- cable -- eth0 10.77.0.2

Both ends of a cable let through ``rate`` and no more (tc's token bucket), so every machine sends
and receives at that rate at the same time. Nothing has a name outside: a namespace lives as long as
a process in it, and the first one in each ends when this process does, however it ends. What is
started with ``enter`` is killed with the thread that started it.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
"""Of every machine, beside loopback."""
_NETWORK = "10.77.0"
_TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
_BURST = {"gbit": "64kb", "mbit": "16kb"}
"""At most about 1 ms of the rate, so that it holds for a single message too."""
_START_SECONDS = 10.0


class NoNamespacesError(RuntimeError):
    """Network namespaces cannot be made here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """One namespace."""

    address: str
    enter: tuple[str, ...]
    """To be put before a command that is to run on it."""


def why_not() -> str | None:
    """Return why machines cannot be made here; None where they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    if os.geteuid():
        return "it takes root to make network namespaces"
    try:
        with machines(1, "1gbit"):
            return None
    except NoNamespacesError as error:
        return str(error)


@contextlib.contextmanager
def machines(count: int, rate: str) -> Iterator[list[Machine]]:
    """Make machines, and remove them in the end.

    Args:
        count: at most 200.
        rate: of every cable in each direction, as tc writes it: "1gbit", "100mbit".

    Raises:
        NoNamespacesError: the system does not let us.
    """
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_namespace())
        _run(switch, "ip link add bridge type bridge\nip link set bridge up")
        made = []
        for number in range(count):
            holder = stack.enter_context(_namespace())
            address = f"{_NETWORK}.{number + 1}"
            _run(
                switch,
                f"ip link add port{number} type veth peer name {INTERFACE} netns {holder}\n"
                f"ip link set port{number} master bridge\n"
                f"ip link set port{number} up\n"
                f"tc qdisc add dev port{number} root {_bucket(rate)}",
            )
            _run(
                holder,
                "ip link set lo up\n"
                f"ip address add {address}/24 dev {INTERFACE}\n"
                f"ip link set {INTERFACE} up\n"
                f"tc qdisc add dev {INTERFACE} root {_bucket(rate)}",
            )
            enter = ("setpriv", "--pdeathsig", "KILL", *_entering(holder))
            made.append(Machine(address, enter))
        yield made


def _bucket(rate: str) -> str:
    burst = next((size for unit, size in _BURST.items() if rate.endswith(unit)), "16kb")
    return f"tbf rate {rate} burst {burst} latency 100ms"


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """Hold a new network namespace, and yield a process in it."""
    # cat ends when nobody is left to write to it: when this process is gone.
    holder = subprocess.Popen(
        ["unshare", "--net", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stderr is not None
    try:
        own, deadline = _namespace_of("self"), time.monotonic() + _START_SECONDS
        while _namespace_of(str(holder.pid)) in (own, None) or not _is_cat(holder.pid):
            if holder.poll() is not None or time.monotonic() > deadline:
                said = holder.stderr.read().strip() if holder.poll() is not None else ""
                raise NoNamespacesError(f"no network namespace: {said or 'unshare hangs'}")
            time.sleep(0.005)
        yield holder.pid
    finally:
        holder.stdin.close()
        try:
            holder.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
        holder.stderr.close()


def _namespace_of(process: str) -> str | None:
    try:
        return str(Path(f"/proc/{process}/ns/net").readlink())
    except OSError:
        return None


def _is_cat(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="ascii").strip() == "cat"
    except OSError:
        return False


def _entering(holder: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{holder}/ns/net", "--")


def _run(holder: int, commands: str) -> None:
    for command in commands.splitlines():
        done = subprocess.run(
            [*_entering(holder), *command.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoNamespacesError(f"`{command}` failed: {done.stderr.strip()}")
