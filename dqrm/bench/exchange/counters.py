"""What a network interface itself says it sent and received."""

from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 66
"""Of a packet of an established TCP connection over IPv4: Ethernet 14, IP 20, TCP 20 and its
time stamps 12."""


@dataclass(frozen=True)
class Counters:
    """Of one interface, since it came up."""

    sent_bytes: int
    """Headers included."""
    sent_packets: int
    received_bytes: int
    received_packets: int

    @property
    def sent_headers(self) -> int:
        """Bytes of the headers of what was sent.

        Where the kernel hands an interface large packets to be cut up later, both counters count
        one, with one header.
        """
        return HEADER_BYTES * self.sent_packets

    @property
    def sent_payload(self) -> int:
        """Bytes sent without headers."""
        return self.sent_bytes - self.sent_headers

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(
            self.sent_bytes - before.sent_bytes,
            self.sent_packets - before.sent_packets,
            self.received_bytes - before.received_bytes,
            self.received_packets - before.received_packets,
        )


def read_counters(interface: str, text: str | None = None) -> Counters:
    """Return the counters of an interface in this process's network namespace.

    Args:
        interface: its name.
        text: of /proc/self/net/dev, where not to be read.

    Raises:
        ValueError: there is no such interface.
    """
    if text is None:
        text = Path("/proc/self/net/dev").read_text(encoding="ascii")
    for line in text.splitlines():
        name, colon, fields = line.partition(":")
        if colon and name.strip() == interface:
            numbers = [int(field) for field in fields.split()]
            return Counters(numbers[8], numbers[9], numbers[0], numbers[1])
    raise ValueError(f"there is no network interface {interface!r} here")
