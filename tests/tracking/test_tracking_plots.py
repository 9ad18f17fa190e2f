import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from dqrm.tracking.plots import calibration_bins, plot_calibration, plot_curves


def drawn(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def test_curves_hold_the_history() -> None:
    history = [{"step": s, "train/loss": 1 / s} for s in (10, 20, 30)]
    history += [{"step": s, "val/auc": a, "val/log_loss": 0.3} for s, a in ((15, 0.7), (30, 0.6))]
    figure = plot_curves(history)
    loss, auc = figure.axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[10, 20, 30], [15, 30]]
    assert list(auc.lines[0].get_ydata()) == [0.7, 0.6]
    assert auc.get_title() == "AUC, best 0.7000 at step 15"
    assert loss.get_ylabel() == "log loss (nats per row)"
    assert drawn(figure).startswith(b"\x89PNG")


def test_curves_of_a_run_without_measurements() -> None:
    assert drawn(plot_curves([])).startswith(b"\x89PNG")


def test_calibration_bins_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    p = np.round(rng.random(1000), 2)
    y = (rng.random(1000) < p).astype(np.float32)
    mean, rate, error, counts = calibration_bins(p, y, 10)
    assert counts.sum() == 1000
    assert abs(counts - 100).max() < 30  # ties of two decimals move at most some tens of rows
    begin = 0
    order = np.argsort(p, kind="stable")
    for m, r, e, n in zip(mean, rate, error, counts, strict=True):
        rows = order[begin : begin + n]
        begin += n
        assert m == pytest.approx(p[rows].mean())
        assert r == pytest.approx(y[rows].mean())
        assert e == pytest.approx(2 * np.sqrt(r * (1 - r) / n))


def test_equal_predictions_share_a_bin() -> None:
    mean, rate, _, counts = calibration_bins([0.25] * 8, [1, 0, 0, 0] * 2, 20)
    assert (mean.tolist(), rate.tolist(), counts.tolist()) == ([0.25], [0.25], [8])
    assert drawn(plot_calibration([0.25] * 8, [1, 0, 0, 0] * 2)).startswith(b"\x89PNG")


def test_calibration_needs_labels_for_predictions() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        plot_calibration([0.1, 0.2], [1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        plot_calibration([], [])
