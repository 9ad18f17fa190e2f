"""Reading random rows, the limit that look-ups are held to, does what its plain twin does."""

import pytest
import torch

from dqrm.kernels.cpu import ISA_VARIABLE, available_levels
from dqrm.kernels.gather import gather_rows, gather_rows_reference


@pytest.fixture(params=available_levels() or [pytest.param("", marks=pytest.mark.skip)])
def level(request, monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("row_bytes", [1, 8, 12, 20, 64, 65, 256])
@pytest.mark.parametrize("out_bytes", [64, 68, 256])
@pytest.mark.parametrize("ahead", [0, 1, 16])
def test_rows_are_read_as_the_reference_does(level, row_bytes, out_bytes, ahead):
    generator = torch.Generator().manual_seed(row_bytes)
    table = torch.randint(0, 256, (300, row_bytes), dtype=torch.uint8, generator=generator)
    for count in (0, 1, 9000):
        rows = torch.randint(0, 300, (count,), generator=generator)
        out = torch.zeros(count, out_bytes, dtype=torch.uint8)
        expected = torch.ones_like(out)
        gather_rows(table, rows, out, ahead=ahead)
        gather_rows_reference(table, rows, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_a_row_outside_the_table_is_refused_and_nothing_written(level, bad):
    table, out = torch.ones(300, 8, dtype=torch.uint8), torch.zeros(3, 64, dtype=torch.uint8)
    with pytest.raises(IndexError, match="outside the table"):
        gather_rows(table, torch.tensor([0, bad, 1]), out)
    assert not out.any()
