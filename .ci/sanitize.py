"""Runs the tests of the compiled loops under the address and undefined behaviour sanitizers.

    python .ci/sanitize.py [pytest arguments]

Builds the extension a second time, into build/sanitize, and puts it in place of the installed one
in this run only. Needs GCC or Clang with its sanitizer libraries. Leaks are not looked for: what
Python and torch keep to the end cannot be told from ours.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
# Everything that calls compiled loops, save what only compiles graphs of torch for minutes.
TESTS = ["tests/kernels", "tests/models", "tests/compress", "tests/serving"]
ARGUMENTS = ["-q", "-p", "no:cacheprovider", "-k", "not compile"]
LOADED_FIRST = ("libasan.so", "libubsan.so", "libstdc++.so")


def main() -> int:
    """Build or run, whichever this process was started for."""
    if os.environ.get("DQRM_SANITIZED"):
        return run_tests(sys.argv[1:])
    library = build()
    libraries = [_library(name) for name in LOADED_FIRST]
    environment = os.environ | {
        "DQRM_SANITIZED": str(library),
        "DQRM_REQUIRE_KERNELS": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def build() -> Path:
    """Compile the extension with sanitizers and return the library."""
    wheels = BUILD / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", str(ROOT), "--wheel-dir", str(wheels)]
    command += ["-C", f"build-dir={BUILD / 'cmake'}", "-C", "cmake.define.DQRM_SANITIZE=ON"]
    if os.environ.get("DQRM_BUILD_TOOLS_INSTALLED"):
        command.append("--no-build-isolation")
    print("building the sanitized extension (a few minutes the first time)", flush=True)
    # What drives oneCCL is left out, and so need not be fetched.
    subprocess.run(command, check=True, env=os.environ | {"DQRM_ONECCL_HEADERS": "off"})
    newest = max(wheels.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    with zipfile.ZipFile(newest) as wheel:
        names = [name for name in wheel.namelist() if Path(name).match("dqrm/kernels/_native.*.so")]
        [name] = names
        return Path(wheel.extract(name, BUILD))


def run_tests(arguments: list[str]) -> int:
    """Run the tests with the sanitized extension; anything but 0 means something is wrong."""
    import importlib.util

    library = os.environ["DQRM_SANITIZED"]
    if b"__asan_init" not in Path(library).read_bytes():
        raise SystemExit(f"{library} was not built with sanitizers")
    spec = importlib.util.spec_from_file_location("dqrm.kernels._native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Where dqrm.kernels.cpu finds it instead of the installed one.
    sys.modules["dqrm.kernels._native"] = module

    import pytest

    from dqrm.kernels.cpu import native

    assert native() is module
    return int(pytest.main([*ARGUMENTS, *(arguments or TESTS)]))


def _library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
