"""Choice of the instruction set, and life without the compiled module."""

import subprocess
import sys

import pytest

from dqrm.kernels import cpu


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_levels_start_at_scalar_and_the_last_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.native_available():
        pytest.skip("the compiled kernels are not installed")
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    assert cpu.available_levels()[0] == "scalar"
    assert cpu.isa_level() == cpu.available_levels()[-1]
    monkeypatch.setenv(cpu.ISA_VARIABLE, "scalar")
    assert cpu.isa_level() == "scalar"


@pytest.mark.parametrize("level", ["sse9", "AVX2", "reference"])
def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, level)
    with pytest.raises(ValueError, match=f"DQRM_CPU_ISA={level}: unknown; available here: "):
        cpu.isa_level()


def test_a_level_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_levels", lambda: ("scalar",))
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx512")
    with pytest.raises(ValueError, match="avx512: not available; available here: scalar"):
        cpu.isa_level()


def test_a_wrong_level_stops_the_parser() -> None:
    if not cpu.native_available():
        pytest.skip("the compiled kernels are not installed")
    code = "from dqrm.kernels import *; parse_delimited(b'1', Plan((Field(Role.DENSE),)))"
    done = run(code, DQRM_CPU_ISA="fast")
    assert done.returncode == 1
    assert "ValueError: DQRM_CPU_ISA=fast: unknown; available here: scalar" in done.stderr


def test_without_the_compiled_module_all_works_and_says_so_once() -> None:
    code = """
import sys
sys.modules["dqrm.kernels._native"] = None
import numpy as np
from dqrm.kernels import *
from dqrm.kernels import cpu
for _ in range(2):
    parsed = parse_delimited(b"1\\tx\\n", Plan((Field(Role.DENSE), Field(Role.CATEGORICAL))))
keys = hash_strings(np.array([0, 1]), b"x")
assert parsed.unique_keys[0].tolist() == keys.tolist()
assert KeyIndex(keys).lookup(keys).tolist() == [1]
assert encode_keys(keys)[0].tolist() == bucket_of(keys, 1).tolist() == [0]
assert not cpu.native_available() and cpu.available_levels() == ()
print(cpu.isa_level(), cpu.unavailable_reason())
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference import of dqrm.kernels._native halted")
    assert done.stderr.count("do their work, tens to hundreds of times slower") == 1


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dqrm.kernels; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    assert run(code).stdout == "[]\n"
    code = "import sys, dqrm.kernels.delimited, dqrm.kernels.keys; print('torch' in sys.modules)"
    assert run(code).stdout == "False\n"
