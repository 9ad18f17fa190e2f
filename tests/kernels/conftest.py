"""Shared by the kernel tests: every instruction set, and exact comparison of parsed rows."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dqrm.kernels.cpu import ISA_VARIABLE, available_levels
from dqrm.kernels.plan import ByteBuffer, ParsedRows, Plan


@pytest.fixture(params=available_levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this build and processor in turn, forced as a user would."""
    if request.param == "none":
        pytest.skip("the compiled kernels are not installed")
    # Not monkeypatch, which hypothesis refuses to share between examples.
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = request.param
    yield request.param
    if before is None:
        del os.environ[ISA_VARIABLE]
    else:
        os.environ[ISA_VARIABLE] = before


@pytest.fixture(scope="session")
def ctr_data() -> Path:
    """Folder of the real click data, which only developers have."""
    root = Path(__file__).parents[2]
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


def assert_same(got: ParsedRows, expected: ParsedRows) -> None:
    for field in dataclasses.fields(ParsedRows):
        left, right = getattr(got, field.name), getattr(expected, field.name)
        assert _bits(left) == _bits(right), f"{field.name}: {left} is not {right}"


@pytest.fixture(scope="session")
def check_native() -> Callable[..., ParsedRows]:
    """Parses natively and plainly, asserts that everything is equal, returns the rows."""
    from dqrm.kernels.delimited import parse_delimited, parse_delimited_reference

    def check(buffer: ByteBuffer, plan: Plan, max_malformed: int = 1000) -> ParsedRows:
        got = parse_delimited(buffer, plan, max_malformed=max_malformed)
        assert_same(got, parse_delimited_reference(buffer, plan, max_malformed=max_malformed))
        return got

    return check
