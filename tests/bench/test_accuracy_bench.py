"""The comparison of a recipe with FP32 trains for real and goes on with what is complete."""

import json

from click.testing import CliRunner

from dqrm.cli import cli
from dqrm.study import running


def test_the_command_compares_and_keeps_its_runs(clicks_data, tmp_path, monkeypatch):
    report, picture = tmp_path / "out.json", tmp_path / "curves.png"
    shape = ["model.embedding_dim=4", "model.bottom_mlp=[8]", "model.top_mlp=[8]"]
    command = [
        *("bench", "accuracy", f"data.path={clicks_data}", *shape, f"output={tmp_path}"),
        *("train.max_steps=20", "train.threads=1", "tracking.enabled=false", "--seeds", "0"),
        *("--json", str(report), "--plot", str(picture)),
    ]
    first = CliRunner().invoke(cli, command, standalone_mode=False)
    assert first.exception is None
    assert first.return_value == 0
    arms = json.loads(report.read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["FP32", "FP32, then INT4 by row", "INT4"]
    full, after, trained = (arm["outcomes"][0] for arm in arms)
    assert len({arm["outcomes"][0]["test"]["auc"] for arm in arms}) == 3
    assert trained["packed_bytes"] < after["packed_bytes"] < full["packed_bytes"]
    assert f"{trained['test']['auc']:.4f}" in first.stdout
    assert f"{trained['curve'][0]['auc']:.4f}" in first.stdout
    assert picture.stat().st_size > 10_000

    def refuse(*arguments, **settings):
        raise AssertionError("a process was started")

    monkeypatch.setattr(running.Crew, "_run", refuse)
    again = CliRunner().invoke(cli, command, standalone_mode=False)
    assert again.stdout == first.stdout
