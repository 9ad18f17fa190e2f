"""Intel's extension: refused with the reason where it cannot work, exact where it can."""

import pytest

from dqrm.comm.backends import probe_ipex
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.training.ipex import check_ipex
from dqrm.training.run import train

FULL = ["train.optimize=ipex", "quant.mlp_bits=32", "tracking.enabled=false"]
here = probe_ipex().usable


def config(*overrides):
    return load(RunConfig, None, [*FULL, *overrides])


@pytest.mark.skipif(here, reason="the extension is installed")
def test_without_the_extension_it_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(ValueError, match=r"train\.optimize=ipex: Intel Extension .* torch 2\.8"):
        train(config(f"output={tmp_path}"))
    assert list(tmp_path.iterdir()) == []
    check_ipex(load(RunConfig, None, ["train.optimize=default"]))


@pytest.mark.parametrize(
    "override",
    ["quant.mlp_bits=4", "optim.weight_decay=0.1", "optim.clip_norm=1"],
)
def test_settings_that_are_not_for_it_are_refused(monkeypatch, override):
    monkeypatch.setattr("dqrm.training.ipex.probe_ipex", _Usable)
    with pytest.raises(ValueError, match=rf"{override.partition('=')[0]}=.*train\.optimize=ipex"):
        check_ipex(config(override))
    check_ipex(config())


class _Usable:
    usable = True


@pytest.mark.skipif(not here, reason="needs an environment with torch 2.8 and the extension")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", ["optim.name=sgd", "optim.name=adagrad", "optim.name=adam"])
def test_it_learns_as_the_default_does_and_resumes_exactly(clicks_data, tmp_path, bf16, rule):
    def run(name, *overrides, **options):
        settings = [f"output={tmp_path}", f"name={name}", f"data.path={clicks_data}"]
        settings += ["data.batch_size=256", "train.threads=1"]
        settings += [f"train.precision={'bf16' if bf16 else 'fp32'}"]
        settings += [rule] if rule == "optim.name=sgd" else [rule, "optim.lr=0.01"]
        return train(config(*settings, *overrides), **options)

    whole = run("whole", "train.epochs=2")
    plain = run("plain", "train.epochs=2", "train.optimize=default")
    assert abs(whole.validation.auc - plain.validation.auc) < 0.01
    run("cut", "train.epochs=2", "train.max_steps=9")
    resumed = run("cut", "train.epochs=2", resume=tmp_path / "cut")
    assert resumed.validation == whole.validation
    for file in ("model", "optimizer"):
        path = f"checkpoints/step-{whole.best_step:08d}/{file}.safetensors"
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
