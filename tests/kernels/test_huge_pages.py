"""Memory on huge pages: what is asked for, and what one gets where there are none."""

from pathlib import Path

import pytest
import torch

from dqrm.kernels import huge_pages


def test_tensors_are_usable_and_aligned():
    for shape in [(3,), (5, 7), (huge_pages.SMALLEST_BYTES // 64 + 1, 16)]:
        tensor = huge_pages.zeros(*shape)
        assert tensor.shape == shape
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
    assert huge_pages.empty(4, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_small_tensors_are_left_alone():
    assert not huge_pages.advise(torch.empty(1000))


@pytest.mark.skipif(not huge_pages.available(), reason="no huge pages here")
def test_large_tensors_get_huge_pages():
    tensor = torch.empty(huge_pages.SMALLEST_BYTES)
    assert huge_pages.advise(tensor)
    tensor.zero_()
    address = tensor.data_ptr()
    flags, inside = [], False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address + tensor.nbytes // 2 < end
        elif inside and first == "VmFlags:":
            flags.append(line.split())
    assert len(flags) == 1
    assert "hg" in flags[0]


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(huge_pages, "available", lambda: False)
    assert not huge_pages.advise(torch.empty(huge_pages.SMALLEST_BYTES))
