"""Shared by the kernel tests: exact comparison of native and plain results at every level."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dqrm.kernels.cpu import ISA_VARIABLE, available_levels
from dqrm.kernels.delimited import parse_delimited, parse_delimited_reference
from dqrm.kernels.plan import ByteBuffer, ParsedRows, Plan


@contextmanager
def forced(level: str) -> Iterator[None]:
    """The instruction set that a user would force by the variable.

    Not monkeypatch: hypothesis runs many examples in one use of a function's fixtures.
    """
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before


@pytest.fixture(scope="session")
def each_level() -> Callable[[], Iterator[str]]:
    """Iterates over all instruction sets of this build and processor, forcing each in turn."""
    if not available_levels():
        pytest.skip("the compiled kernels are not installed")

    def levels() -> Iterator[str]:
        for level in available_levels():
            with forced(level):
                yield level

    return levels


@pytest.fixture(scope="session")
def ctr_data() -> Path:
    """Folder of the real click data, which only developers have."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("DQRM_SHARED_DATA", root.parent / "shared" / "data")) / "ctr"
    if not folder.is_dir():
        pytest.skip(f"real click data is not at {folder}; DQRM_SHARED_DATA names its folder")
    return folder


def _bits(value: object) -> object:
    """A comparable form that tells apart what == does not: dtype, shape, minus zero."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return [_bits(item) for item in value]
    return value


@pytest.fixture(scope="session")
def parse_checked(each_level: Callable[[], Iterator[str]]) -> Callable[..., ParsedRows]:
    """Parses plainly and at every level, asserts that all is equal bit for bit, returns it."""

    def check(buffer: ByteBuffer, plan: Plan, max_malformed: int = 1000) -> ParsedRows:
        expected = parse_delimited_reference(buffer, plan, max_malformed=max_malformed)
        for level in each_level():
            got = parse_delimited(buffer, plan, max_malformed=max_malformed)
            for field in dataclasses.fields(ParsedRows):
                left, right = getattr(got, field.name), getattr(expected, field.name)
                assert _bits(left) == _bits(right), f"{level} {field.name}: {left} is not {right}"
        return expected

    return check
