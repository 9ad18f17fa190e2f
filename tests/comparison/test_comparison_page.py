"""The HTML report: well-formed, self-contained, complete without scripts, safe."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result

from dqrm.comparison.scales import Scale, linear, logarithmic, plain, root, whole

Make = Callable[..., Path]
Run = Callable[..., Result]

_VOID = {"meta", "br"}
_LOADING = {"link", "img", "iframe", "object", "embed", "base", "source", "use", "image"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what may not be in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(dqrm: Run, *words: str) -> str:
    result = dqrm("compare", *words, "--html", "report.html")
    assert result.exit_code == 0, result.output
    return Path("report.html").read_text()


def test_the_report_needs_nothing_but_itself(dqrm: Run, make: Make) -> None:
    make("fp32", auc=0.81, quant__bits=32)
    make("int4-seed0")
    make("int4-seed1", train__seed=1)
    text = report(dqrm, "runs/fp32", "runs/int4-seed0", "runs/int4-seed1")
    page = Page(text)
    assert not _LOADING & set(page.tags)
    assert page.tags.count("script") == 1
    assert not [found for found in page.attributes if found[1] in ("src", "srcset", "data")]
    assert not [found for found in page.attributes if found[1].startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text, "these runs are in no store"
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for picture in pictures:
        ElementTree.fromstring(picture)
    # AUC, log loss, size, reliability, calibration, two of tables; none was distributed.
    assert len(pictures) == 7
    assert text.count("is left out:") == 1
    assert "Bytes on the wire against step time is left out: no run exchanged gradients" in text


def test_best_epochs_and_values_are_marked(dqrm: Run, make: Make) -> None:
    make("int4")
    make("fp32", auc=0.81, quant__bits=32)
    text = report(dqrm, "int4", "fp32")
    # One ring in each of two pictures for each of two runs.
    assert len(re.findall(r'<circle class="ring', text)) == 4
    assert "int4: best, 0.8000, epoch 2" in text
    assert re.search(r'<td class="best" data-value="0.81">0.8100</td>', text)


@pytest.mark.parametrize(("other", "said"), [(0.801, True), (0.9, False)], ids=["near", "far"])
def test_a_lead_within_the_spread_of_seeds_is_called_so(
    dqrm: Run, make: Make, other: float, said: bool
) -> None:
    for seed, noise in enumerate((-0.01, 0.01)):
        make(f"int4-seed{seed}", auc=0.8 + noise, train__seed=seed)
        make(f"int8-seed{seed}", auc=other + noise, train__seed=seed, quant__bits=8)
    text = report(dqrm, *(f"runs/int{bits}-seed{seed}" for bits in (4, 8) for seed in (0, 1)))
    assert ("int4 within the spread over seeds" in text) == said
    assert ("against 0.8000 of int4" in text) == (not said)


def test_hostile_names_stay_text(dqrm: Run, make: Make) -> None:
    hostile = "<script>alert(1)<|script>\"'&x"
    path = make("evil", data__path='"><img src=x onerror=alert(1)>')
    path.rename(path.with_name(hostile))
    make("good", quant__bits=8)
    text = report(dqrm, f"runs/{hostile}", "runs/good")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [found for found in page.attributes if found[1].startswith("on")]
    assert "&lt;script&gt;alert(1)" in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture)


def test_pictures_without_data_are_left_out_with_a_reason(dqrm: Run, make: Make) -> None:
    empty = [{"step": 1, "train/loss": 0.7}]
    make("one", finished=False, history=empty)
    make("two", finished=False, history=empty, quant__bits=8)
    text = report(dqrm, "one", "two")
    page = Page(text)
    assert "svg" not in page.tags
    assert text.count("is left out:") == 8
    assert "None of these runs has metrics yet." in text


def test_a_run_that_was_stopped_does_not_hide_the_test_of_the_others(dqrm: Run, make: Make) -> None:
    make("int4")
    make("stopped", finished=False, quant__bits=2)
    assert "Test AUC against packed size" in report(dqrm, "int4", "stopped")
    make("stopped-too", finished=False, quant__bits=8)
    text = report(dqrm, "int4", "stopped", "stopped-too")
    assert "Validation AUC against packed size" in text


def test_one_class_only_is_no_figure(dqrm: Run, make: Make) -> None:
    history = [{"step": 10, "val/auc": float("nan"), "val/log_loss": 0.3}]
    make("nan", auc=float("nan"), history=history)
    make("fine", quant__bits=8)
    text = report(dqrm, "nan", "fine")
    Page(text)
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "nan" not in re.sub(r"<title>.*?</title>|<text.*?</text>", "", picture)


SCALES = {
    "linear": linear([0.9391, 0.9440]),
    "one-value": linear([5.0]),
    "zero": linear([0.0]),
    "from-zero": linear([3.0, 17.0], include=[0.0]),
    "negative": linear([-2.0, 1.0]),
    "epochs": whole([1.0, 8.0]),
    "half-epoch": whole([0.5]),
    "bytes": logarithmic([29_000, 217_000], 2.0),
    "one-size": logarithmic([1000.0], 2.0),
    "between-powers": logarithmic([44.0], 2.0),
    "wide": logarithmic([1.0, 1e9]),
    "root": root(0.7),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_ticks_lie_on_their_axis_and_read_differently(scale: Scale) -> None:
    assert 1 <= len(scale.ticks) <= 12
    places = [scale.place(tick) for tick in scale.ticks]
    assert places == sorted(places)
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    texts = [plain(scale)(tick) for tick in scale.ticks]
    assert len(set(texts)) == len(texts)
