"""Shared by the kernel tests: exact comparison of native and plain results at every level."""

import dataclasses
import itertools
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
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


# Fuzzing: cases are made by a function of a random generator that asserts what must hold.
Case = Callable[[random.Random], None]
FUZZ_SEEDS = 250
FUZZ_VARIABLE = "DQRM_FUZZ_SECONDS"


def _fuzz_seeds() -> Iterator[int]:
    """The fixed seeds, then further ones for as long as the variable says."""
    end = time.monotonic() + float(os.environ.get(FUZZ_VARIABLE, 0))
    for seed in itertools.count():
        if seed >= FUZZ_SEEDS and time.monotonic() >= end:
            return
        yield seed


def _fuzz(case: Case, report: Connection) -> None:
    """Send seed and level of every case before it runs, and what went wrong with the last."""
    import torch

    # Threads of torch's pool did not come along into this process.
    torch.set_num_threads(1)
    levels = available_levels()
    for seed in _fuzz_seeds():
        level = os.environ[ISA_VARIABLE] = levels[seed % len(levels)]
        report.send((f"seed {seed} at {level}", None))
        torch.manual_seed(seed)
        try:
            case(random.Random(seed))
        except BaseException:
            report.send((f"seed {seed} at {level}", traceback.format_exc()))
            return
    report.send(None)


@pytest.fixture
def fuzz() -> Callable[[Case], None]:
    """Runs a case with many seeds in a child process, so that a crash is a failed test.

    The levels take turns. Seeds are fixed; DQRM_FUZZ_SECONDS=600 goes on with further ones for that
    long.
    """
    if not available_levels():
        pytest.skip("the compiled kernels are not installed")

    def run(case: Case) -> None:
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_fuzz, args=(case, sender))
        process.start()
        sender.close()
        at, wrong = "before the first seed", None
        try:
            while wrong is None and (message := receiver.recv()) is not None:
                at, wrong = message
        except EOFError:
            process.join()
            pytest.fail(f"{at}: the process ended with {process.exitcode}")
        process.join()
        assert wrong is None, f"{at}:\n{wrong}"

    return run
