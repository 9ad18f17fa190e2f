"""Delimited text (Criteo's TSV, CSV) to columns of numbers and ids."""

from types import ModuleType

import numpy as np

from dqrm.kernels.cpu import announce_fallback, isa_level, native
from dqrm.kernels.delimited_reference import parse_delimited_reference
from dqrm.kernels.plan import ByteBuffer, Field, Malformed, ParsedRows, Plan, Role
from dqrm.kernels.rows import RowError, parse_row

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
    """Parse lines of text; other threads run meanwhile.

    buffer: anything with contiguous bytes (bytes, memoryview, mmap), without a byte order mark.
    max_malformed: how many malformed lines are described; all are counted and left out.
    """
    if max_malformed < 0:
        raise ValueError(f"max_malformed={max_malformed}: must be 0 or more")
    module = native()
    if module is None:
        announce_fallback()
        return parse_delimited_reference(buffer, plan, max_malformed=max_malformed)
    return _parse_native(module, buffer, plan, max_malformed, isa_level())


def _parse_native(
    module: ModuleType, buffer: ByteBuffer, plan: Plan, max_malformed: int, level: str
) -> ParsedRows:
    result = module.parse(
        buffer,
        [(int(field.role), field.buckets, field.log1p) for field in plan.fields],
        ord(plan.delimiter),
        -1 if plan.quote is None else ord(plan.quote),
        ord(plan.list_separator),
        max_malformed,
        level,
    )
    categorical = plan.positions(Role.CATEGORICAL) + plan.positions(Role.MULTI_HOT)
    text = memoryview(buffer).cast("B")
    rows = result["rows"]
    return ParsedRows(
        rows=rows,
        lines=result["lines"],
        label=result["label"] if plan.positions(Role.LABEL) else np.zeros(rows, np.float32),
        dense=result["dense"],
        time=result.get("time"),
        ids=result["ids"],
        lists=result["lists"],
        unique_keys=[
            None if plan.fields[position].buckets else keys
            for position, keys in zip(categorical, result["keys"], strict=True)
        ],
        missing=result["missing"],
        malformed=[
            _explain(line, text[begin:end], plan) for line, begin, end in result["malformed"]
        ],
        malformed_count=result["malformed_count"],
    )


def _explain(line: int, text: memoryview, plan: Plan) -> Malformed:
    """What the reference finds wrong in a line that the native parser refused."""
    try:
        parse_row(bytes(text), plan)
    except RowError as error:
        return Malformed(line, error.field, error.reason)
    raise AssertionError(f"native and reference parser disagree about line {line}")
