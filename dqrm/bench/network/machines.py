"""Namespaces as machines, joined by a switch whose cables have a rate.

    with machines(2, "1gbit") as made:
        subprocess.run([*made[1].enter, "ping", "-c", "1", made[0].name])

    node1                        switch                     node2
    eth0 10.77.0.1 -- cable -- port0 = bridge = port1 -- cable -- eth0 10.77.0.2

A machine has an interface, a host name and an /etc/hosts that knows all machines; files and
processes are this machine's.

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

    name: str
    """Its host name, known to all."""
    address: str
    enter: tuple[str, ...]
    """To be put before a command that this process starts on it."""


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
        names = {f"node{number}": f"{_NETWORK}.{number}" for number in range(1, count + 1)}
        known = {"localhost": "127.0.0.1", **names}
        hosts = "".join(f"{address} {name}\n" for name, address in known.items())
        switch = stack.enter_context(_namespaces("switch", hosts))
        _run(switch, "ip link add bridge type bridge\nip link set bridge up")
        made = []
        for name, address in names.items():
            holder, port = stack.enter_context(_namespaces(name, hosts)), f"port-{name}"
            _run(
                switch,
                f"ip link add {port} type veth peer name {INTERFACE} netns {holder}\n"
                f"ip link set {port} master bridge\n"
                f"ip link set {port} up\n"
                f"tc qdisc add dev {port} root {_bucket(rate)}",
            )
            _run(
                holder,
                "ip link set lo up\n"
                f"ip address add {address}/24 dev {INTERFACE}\n"
                f"ip link set {INTERFACE} up\n"
                f"tc qdisc add dev {INTERFACE} root {_bucket(rate)}",
            )
            made.append(Machine(name, address, (*_BOUND, str(os.getpid()), *_entering(holder))))
        yield made


def _bucket(rate: str) -> str:
    burst = next((size for unit, size in _BURST.items() if rate.endswith(unit)), "16kb")
    return f"tbf rate {rate} burst {burst} latency 100ms"


# Killed with its parent. Where that ended before the kernel was told so, another is the parent now.
_BOUND = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ $PPID = "$0" ] && exec "$@"')
# Ends when nobody is left to write to it: when the process that started it is gone.
_HOLD = """
echo "$0" > /proc/sys/kernel/hostname &&
mount -t tmpfs tmpfs /mnt && printf %s "$1" > /mnt/hosts &&
mount --bind /mnt/hosts /etc/hosts && umount -l /mnt && exec cat
"""


@contextlib.contextmanager
def _namespaces(name: str, hosts: str) -> Iterator[int]:
    """Hold new namespaces with a host name and an /etc/hosts, and yield a process in them."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", _HOLD, name, hosts],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stderr is not None
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _is_cat(holder.pid):
            if holder.poll() is not None or time.monotonic() > deadline:
                said = holder.stderr.read().strip() if holder.poll() is not None else ""
                raise NoNamespacesError(f"no namespaces: {said or 'unshare hangs'}")
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


def _is_cat(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="ascii").strip() == "cat"
    except OSError:
        return False


def _entering(holder: int) -> tuple[str, ...]:
    # Entering a mount namespace would lead to its root folder; --wd goes back.
    return ("nsenter", f"--target={holder}", "--net", "--uts", "--mount", "--wd=.", "--")


def _run(holder: int, commands: str) -> None:
    for command in commands.splitlines():
        done = subprocess.run(
            [*_entering(holder), *command.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoNamespacesError(f"`{command}` failed: {done.stderr.strip()}")
