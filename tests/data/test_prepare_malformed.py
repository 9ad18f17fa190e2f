"""Malformed lines: counted, located, limited."""

import gzip

import pandas as pd
import pytest

from dqrm.data.config import PrepareConfig
from dqrm.data.manifest import read_manifest
from dqrm.data.prepare import prepare

BAD = b"not a row\n"


def with_bad_lines(text: bytes, places: list[int]) -> bytes:
    """Put a bad line so that it becomes line number `place` (from 1) of the file."""
    lines = text.splitlines(keepends=True)
    for place in sorted(places):
        lines.insert(place - 1, BAD)
    return b"".join(lines)


@pytest.fixture(params=["plain", "gzip"])
def packed(request):
    return gzip.compress if request.param == "gzip" else bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_line_numbers_in_every_shard(workers, packed, criteo_text, tmp_path):
    """64 KiB shards hold about 220 lines, so these places are spread over several."""
    places = [1, 2, 219, 700, 1000, 1306]
    text = with_bad_lines(criteo_text(1300, 0), places)
    assert text.splitlines()[1305] == BAD.strip()
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(packed(text))
    second.write_bytes(packed(with_bad_lines(criteo_text(50, 1), [7])))
    config = PrepareConfig(shard_bytes=65536, max_malformed=0.01, workers=workers)
    report = prepare([first, second], tmp_path / "out", config)
    assert report.malformed == 7
    assert report.rows == 1350
    table = pd.read_csv(tmp_path / "out" / "malformed.tsv", sep="\t")
    found = list(zip(table["file"], table["line"], strict=True))
    assert found == [(str(first), place) for place in places] + [(str(second), 7)]
    assert set(table["reason"]) == {"expected 40 fields, found 1"}
    assert [s.malformed for s in read_manifest(tmp_path / "out").sources] == [6, 1]
    assert str(report.malformed_examples[0]) == f"{first}:1: expected 40 fields, found 1"


def test_line_numbers_count_header_and_blank_lines(tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("label,x\n1,2\n\n0,abc\n7,1\n1,5\n0,3\n")
    config = PrepareConfig(
        schema={"label": "label", "dense": ["x"]}, format="csv", max_malformed=2,
        split={"by": "fraction", "validation": 0, "test": 0}, workers=1,
    )  # fmt: skip
    report = prepare([source], tmp_path / "out", config)
    assert [(bad.line, bad.reason) for bad in report.malformed_examples] == [
        (4, "dense value 'abc' is not a number"),
        (5, "label '7' is not 0 or 1"),
    ]
    assert report.rows == 3


@pytest.mark.parametrize(
    ("limit", "fails"), [(0.01, True), (0.013, False), (12, True), (13, False)]
)
def test_limit(limit, fails, criteo_text, tmp_path):
    """13 bad lines of 1,000."""
    places = list(range(100, 113))
    source = tmp_path / "rows"
    source.write_bytes(with_bad_lines(criteo_text(987, 0), places))
    config = PrepareConfig(shard_bytes=65536, max_malformed=limit, workers=1)
    if not fails:
        assert prepare([source], tmp_path / "out", config).malformed == 13
        return
    with pytest.raises(ValueError, match="malformed, more than max_malformed") as caught:
        prepare([source], tmp_path / "out", config)
    message = str(caught.value)
    assert f"{source}:100: expected 40 fields, found 1; {source}:101:" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_format_fails_at_once(workers, criteo_text, tmp_path):
    """With a share for a limit, the first shard of commas in place of tabs is enough."""
    source = tmp_path / "rows"
    source.write_bytes(criteo_text(3000, 0).replace(b"\t", b","))
    seen = []
    config = PrepareConfig(shard_bytes=65536, workers=workers)
    with pytest.raises(ValueError, match=f"{source}:1: expected 40 fields, found 1"):
        prepare([source], tmp_path / "out", config, progress=seen.append)
    assert len(seen) == 1
    assert not (tmp_path / "out").exists()


def test_folder_with_other_files_is_refused(criteo_text, tmp_path):
    (tmp_path / "rows").write_bytes(criteo_text(100, 0))
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        prepare([tmp_path / "rows"], output, PrepareConfig(workers=1), overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"


def test_malformed_rows_of_a_frame(tmp_path):
    frame = pd.DataFrame(
        {
            "label": [0, 1, 2, 1, None, 0],
            "x": ["1", "2.5", "3", "x", "4", ""],
            "c": ["a", "b", "only here", "only there", "c", "a"],
        }
    )
    config = PrepareConfig(
        schema={"label": "label", "dense": ["x"], "categorical": ["c"]}, format="csv",
        split={"by": "fraction", "validation": 0, "test": 0}, max_malformed=3, workers=1,
    )  # fmt: skip
    report = prepare(frame, tmp_path / "out", config)
    assert [(bad.line, bad.reason) for bad in report.malformed_examples] == [
        (3, "label: label '2.0' is not 0 or 1"),
        (4, "x: dense value 'x' is not a number"),
        (5, "label: label 'None' is not 0 or 1"),
    ]
    # Values of rejected rows are not in the vocabulary: a and b, and id 0.
    assert read_manifest(tmp_path / "out").tables[0].num_rows == 3
