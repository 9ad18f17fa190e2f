"""Files that are written at the end of a command are checked at its beginning."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dqrm.data.files import save_figure

LONG = [
    ("bench", "prepare", "--json"),
    ("bench", "exactness", "--json"),
    ("bench", "accuracy", "--json"),
    ("bench", "accuracy", "--plot"),
    ("bench", "kernels", "--plot"),
    ("bench", "exchange", "--json"),
    ("study", "overfit", "--json"),
    ("compare", "--html"),
]


@pytest.mark.parametrize("words", LONG, ids=" ".join)
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(dqrm, words):
    Path("taken").write_text("a file\n")
    result = dqrm(*words, "taken/out.png")
    assert result.exit_code == 2
    assert words[-1] in result.stderr
    assert "is a file, not a folder" in result.stderr
    assert Path("taken").read_text() == "a file\n"


def test_a_folder_is_no_file(dqrm):
    Path("folder").mkdir()
    result = dqrm("bench", "prepare", "--json", "folder")
    assert result.exit_code == 2
    assert "is a directory" in result.stderr


def test_a_picture_needs_an_ending_that_says_how_to_draw_it(dqrm):
    result = dqrm("bench", "kernels", "--plot", "speed.txt")
    assert result.exit_code == 2
    assert "must end with one of .png, .svg, .pdf" in result.stderr


def test_a_folder_for_pictures_may_not_be_a_file(dqrm):
    Path("taken").write_text("")
    Path("glue").mkdir()
    result = dqrm("bench", "transformers", "--data", "glue", "--plots", "taken/plots")
    assert result.exit_code == 2
    assert "is a file, not a folder" in result.stderr


@pytest.mark.parametrize("ending", ["png", "PNG", "svg", "pdf"])
def test_pictures_are_drawn_into_new_folders(ending):
    figure = Figure()
    figure.subplots().plot([0, 1], [1, 0])
    save_figure(figure, Path("new", "folders", f"line.{ending}"))
    (drawn,) = Path("new/folders").iterdir()
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending.lower()]
    assert drawn.read_bytes().startswith(begins)
