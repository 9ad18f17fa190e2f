"""Delimited text (Criteo's TSV, CSV) to columns of numbers and ids."""

from dqrm.kernels.cpu import announce_fallback
from dqrm.kernels.delimited_reference import parse_delimited_reference
from dqrm.kernels.plan import ByteBuffer, Field, Malformed, ParsedRows, Plan, Role

__all__ = [
    "Field",
    "Malformed",
    "ParsedRows",
    "Plan",
    "Role",
    "parse_delimited",
    "parse_delimited_reference",
]


def parse_delimited(buffer: ByteBuffer, plan: Plan, *, max_malformed: int = 1000) -> ParsedRows:
    """Parse whole lines of text; the GIL is free meanwhile.

    buffer: anything with contiguous bytes (bytes, memoryview, mmap), without a byte order mark.
    max_malformed: how many malformed lines are described; all are counted and left out.
    """
    announce_fallback()
    return parse_delimited_reference(buffer, plan, max_malformed=max_malformed)
