"""Peak memory of real runs: within the stated bound, and the same for more rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dqrm.kernels.cpu import native_available

SCRIPT = """
import json, sys
import dqrm.data.stages
from dqrm.data.config import PrepareConfig
from dqrm.data.pool import peak_bytes
from dqrm.data.prepare import prepare

source, output, settings = sys.argv[1:]
before = peak_bytes()
report = prepare([source], output, PrepareConfig(**json.loads(settings)))
print(json.dumps([before, report.peak_bytes, report.memory_bound_bytes]))
"""

MIB = 2**20


def measure(source: Path, output: Path, settings: dict) -> tuple[int, int, int]:
    """Peak before, peak at the end, stated bound; of a fresh process."""
    arguments = [sys.executable, "-c", SCRIPT, source, output, json.dumps(settings)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    before, peak, bound = json.loads(done.stdout)
    return before, peak, bound


@pytest.fixture(scope="module")
def sources(criteo_text, tmp_path_factory) -> tuple[Path, Path]:
    """Two files, the second four times the first; the last column never repeats a value."""
    folder = tmp_path_factory.mktemp("memory")
    lines = [line[: line.rindex(b"\t")] for line in criteo_text(3000, 0).splitlines()]
    repeats = 30 if native_available() else 3
    for name, times in (("small", repeats), ("large", 4 * repeats)):
        with (folder / name).open("wb") as file:
            for start in range(0, times * len(lines), len(lines)):
                file.writelines(b"%s\t%08x\n" % (line, start + i) for i, line in enumerate(lines))
    return folder / "small", folder / "large"


@pytest.mark.parametrize(
    "settings",
    [{}, {"hash_buckets": 1000}, {"split": {"by": "rows"}, "workers": 2}],
    ids=["vocabulary", "hashed", "two-workers"],
)
def test_memory_does_not_grow_with_the_rows(settings, sources, tmp_path):
    settings = {"workers": 1, "shard_bytes": MIB, "merge_bytes": 4 * MIB, **settings}
    small, large = sources
    _, small_peak, _ = measure(small, tmp_path / "small", settings)
    _, large_peak, bound = measure(large, tmp_path / "large", settings)
    assert large_peak <= bound
    grown = large.stat().st_size - small.stat().st_size
    # Without streaming, text alone would add all of this; the shards' figures and the vocabulary
    # that never repeats a value (48 bytes each by the formula) add a little.
    values = 0 if "hash_buckets" in settings else grown / 250
    allowed = 48 * values + grown / 8 + 2 * MIB
    assert large_peak - small_peak < settings["workers"] * allowed


@pytest.mark.skipif(not native_available(), reason="the bound is that of the compiled parser")
@pytest.mark.parametrize(
    ("line", "schema"),
    [
        (b"1\t%06x\n", {"label": "y", "categorical": ["c"]}),
        (
            b"1\t%x|1|2|3|4|5|6|7|8|9\n",
            {"label": "y", "categorical": [{"name": "c", "multi_hot": True}]},
        ),
        (b"1\t2\t%.1s\n", {"label": "y", "dense": ["a", "b"]}),
    ],
    ids=["distinct-values", "lists-of-short-values", "short-numbers"],
)
def test_worst_text_for_its_size(line, schema, tmp_path):
    """Text that becomes the most memory a byte; one shard of 16 MiB."""
    source = tmp_path / "rows"
    with source.open("wb") as file:
        number = 0
        while file.tell() < 16 * MIB:
            chunk = range(number, number + 10_000)
            if b"s" in line:
                file.write((line % b"3") * len(chunk))
            else:
                file.writelines(line % value for value in chunk)
            number += len(chunk)
    settings = {
        "schema": schema, "format": "tsv", "header": False, "workers": 1, "merge_bytes": MIB,
        "shard_bytes": 32 * MIB,
    }  # fmt: skip
    before, peak, bound = measure(source, tmp_path / "out", settings)
    assert peak <= bound
    # The share of the formula that goes with the text; 40 MiB for libraries loaded meanwhile.
    assert peak - before <= 8 * source.stat().st_size + 40 * MIB
