"""Which compiled loops run on this processor.

The extension holds one copy of its loops for each instruction set. The best one that the
processor has is used; DQRM_CPU_ISA=scalar|avx2|avx512 forces another.
"""

import importlib
import logging
import os
from functools import cache
from types import ModuleType
from typing import Final

ISA_VARIABLE: Final = "DQRM_CPU_ISA"
_LEVELS: Final = ("scalar", "avx2", "avx512")

_log = logging.getLogger(__name__)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why there is none."""
    try:
        return importlib.import_module("dqrm.kernels._native"), ""
    except ImportError as error:
        return None, str(error)


def native() -> ModuleType | None:
    """The compiled module, None where it is not installed or does not load."""
    return _load()[0]


def native_available() -> bool:
    """Whether the compiled loops are installed and load."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why the compiled loops cannot be used; empty when they can."""
    return _load()[1]


def available_levels() -> tuple[str, ...]:
    """Levels this build and this processor have, slowest first; empty without a build."""
    module, _ = _load()
    return () if module is None else tuple(module.available_levels())


def isa_level() -> str:
    """Level in use: the forced one, else the best; "reference" without a build.

    Raises ValueError when DQRM_CPU_ISA names no level or one that is not available.
    """
    forced = os.environ.get(ISA_VARIABLE)
    available = available_levels()
    if not forced:
        return available[-1] if available else "reference"
    if forced not in _LEVELS:
        raise ValueError(f"{ISA_VARIABLE}={forced}: unknown; available here: {_named(available)}")
    if forced not in available:
        raise ValueError(
            f"{ISA_VARIABLE}={forced}: not available; available here: {_named(available)}"
        )
    return forced


@cache
def announce_fallback() -> None:
    """Say once, through logging, that plain code does the work, and what that costs."""
    _log.warning(
        "compiled kernels cannot be used (%s): plain Python and torch operators do their work, "
        "tens to hundreds of times slower; a C++20 compiler and `pip install .` give them",
        unavailable_reason(),
    )


def _named(levels: tuple[str, ...]) -> str:
    return ", ".join(levels) or "none, the compiled kernels are not installed"
