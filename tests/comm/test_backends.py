"""What is said about oneCCL, Gloo and IPEX, against packages laid out as pip lays them out."""

import _ctypes
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dqrm.comm import backends
from dqrm.comm.backends import (
    probe_backends,
    probe_ccl_intel,
    probe_gloo,
    probe_ipex,
    probe_oneccl,
)


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def lay_out(folder: Path, name: str, version: str, files: dict[str, bytes | Path]) -> None:
    """An installed package: its files, and the metadata that lists them."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    record = []
    for relative, content in files.items():
        target = (folder / relative).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copy(content, target)
        else:
            target.write_bytes(content)
        record.append(f"{relative},,\n")
    (info / "RECORD").write_text("".join(record))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib" / "python" / "site-packages"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.skipif(installed("oneccl-cpu"), reason="oneccl-cpu is installed")
def test_oneccl_absent() -> None:
    found = probe_oneccl()
    assert not found.usable
    assert found.version is None
    assert found.fix is not None
    assert "pip install oneccl-cpu==" in found.fix


@pytest.mark.skipif(not installed("oneccl-cpu"), reason="oneccl-cpu is not installed")
def test_oneccl_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "module_problem", lambda: None)
    found = probe_oneccl()
    assert found.usable, found.detail
    assert found.library is not None
    assert found.library.name == "libccl.so.1"


def test_oneccl_library_is_found_through_metadata_and_loads(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "module_problem", lambda: None)
    # The wheel puts its library into <prefix>/lib, outside site-packages. Any library that loads
    # will do to see that it is found and tried.
    lay_out(site, "oneccl-cpu", "1.2.3", {"../../libccl.so.1": Path(_ctypes.__file__)})
    found = probe_oneccl()
    assert found.usable, found.detail
    assert found.version == "1.2.3"
    assert found.library == tmp_path / "lib" / "libccl.so.1"
    assert found.fix is None


def test_oneccl_without_the_compiled_module(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "module_problem", lambda: "dqrm was built without it")
    lay_out(site, "oneccl-cpu", "1.2.3", {"libccl.so.1": Path(_ctypes.__file__)})
    found = probe_oneccl()
    assert not found.usable
    assert found.detail.endswith("libccl.so.1 loads, but dqrm was built without it")
    assert found.fix is not None
    assert "oneccl-cpu-devel" in found.fix


def test_oneccl_library_that_does_not_load(site: Path) -> None:
    lay_out(site, "oneccl-cpu", "1.2.3", {"libccl.so.1": b"not a library"})
    found = probe_oneccl()
    assert not found.usable
    assert "does not load" in found.detail
    assert found.fix is not None


def test_oneccl_without_its_library(site: Path) -> None:
    lay_out(site, "oneccl-cpu", "1.2.3", {"other.txt": b""})
    found = probe_oneccl()
    assert not found.usable
    assert "libccl.so.1 is not among its files" in found.detail


def test_gloo_is_in_torch() -> None:
    assert probe_gloo().usable


def test_ipex_of_another_torch_is_refused_without_being_imported(site: Path) -> None:
    broken = b"raise AttributeError('os.exit')\n"
    name = "intel_extension_for_pytorch"
    lay_out(site, "intel-extension-for-pytorch", "2.8.0", {f"{name}/__init__.py": broken})
    found = probe_ipex()
    assert not found.usable
    assert found.version == "2.8.0"
    assert "made for torch 2.8" in found.detail
    assert found.fix is not None
    assert name not in sys.modules


def test_ipex_of_this_torch_is_usable(site: Path) -> None:
    version = ".".join(metadata.version("torch").split(".")[:2]) + ".0"
    lay_out(site, "intel-extension-for-pytorch", version, {})
    assert probe_ipex().usable


@pytest.mark.skipif(installed("intel-extension-for-pytorch"), reason="IPEX is installed")
def test_ipex_absent_needs_no_fix() -> None:
    found = probe_ipex()
    assert not found.usable
    assert found.fix is None


@pytest.mark.parametrize("usable", [True, False])
def test_intels_binding_is_judged_without_being_imported(site: Path, usable: bool) -> None:
    version = metadata.version("torch") if usable else "1.13.0+cpu"
    name = "oneccl_bindings_for_pytorch"
    lay_out(site, "oneccl-bind-pt", version, {f"{name}/__init__.py": b"raise AttributeError\n"})
    found = probe_ccl_intel()
    assert found.usable == usable
    assert found.version == version
    assert usable or "made for torch 1.13, but torch " in found.detail
    assert name not in sys.modules


def test_all_are_reported() -> None:
    assert [backend.name for backend in probe_backends()] == ["oneCCL", "Gloo", "ccl-intel", "IPEX"]
