"""``dqrm pipeline import`` writes a pipeline that can be read."""

import json
import math
from pathlib import Path

from dqrm.compress.transforms.config import QuantTransform, WeightGrid
from dqrm.pipelines.config import load_pipeline

FILE = {
    "train_batch_size": 16,
    "zero_optimization": {"stage": 0},
    "compression_training": {
        "layer_reduction": {"enabled": True, "keep_number_layer": 2},
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "quantize_groups": 1},
            "different_groups": {
                "wq1": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["attention"]}
            },
        },
    },
}


def test_what_is_printed_is_a_pipeline(dqrm):
    Path("ds.json").write_text(json.dumps(FILE))
    options = ["--model", "bert", "--train", "t.tsv", "--dev", "d.tsv"]
    done = dqrm("pipeline", "import", "ds.json", *options)
    assert done.exit_code == 0
    assert done.stderr.splitlines() == ["warning: zero_optimization: no effect"]
    Path("made.yaml").write_text(done.stdout)
    (stage,) = load_pipeline(Path("made.yaml")).stages
    assert stage.stage == "compress"
    assert (stage.model, stage.batch_size, stage.layers) == ("bert", 16, 2)
    assert (str(stage.data.train), str(stage.data.dev)) == ("t.tsv", "d.tsv")
    assert stage.transforms == (
        QuantTransform(
            kind="quant",
            match=(".*(?:attention).*",),
            weight=WeightGrid(bits=8, per="tensor", range="full"),
        ),
    )


def test_a_file_that_asks_for_nothing_is_refused(dqrm):
    Path("ds.json").write_text("{}")
    done = dqrm("pipeline", "import", "ds.json")
    assert done.exit_code == 2
    assert "no compression is enabled in it" in done.stderr
    assert not done.stdout


def test_values_that_make_no_stage_are_refused(dqrm):
    optimizer = {"type": "AdamW", "params": {"lr": -1}}
    Path("ds.json").write_text(json.dumps({**FILE, "optimizer": optimizer}))
    done = dqrm("pipeline", "import", "ds.json")
    assert done.exit_code == 2
    assert "ds.json: optimizer.params.lr=-1: must be greater than 0" in done.stderr
    assert not done.stdout


def test_training_without_clipping_runs(dqrm, tiny_bert, sentence_files):
    reduction = {"layer_reduction": {"enabled": True, "keep_number_layer": 1}}
    tree = {"gradient_clipping": 0, "train_batch_size": 16, "compression_training": reduction}
    tree["optimizer"] = {"params": {"lr": 1e-3}}
    Path("ds.json").write_text(json.dumps(tree))
    tables = ["--train", f"{sentence_files}/train.tsv", "--dev", f"{sentence_files}/dev.tsv.gz"]
    done = dqrm("pipeline", "import", "ds.json", "--model", str(tiny_bert), *tables)
    Path("made.yaml").write_text(done.stdout)
    (stage,) = load_pipeline(Path("made.yaml")).stages
    assert stage.max_grad_norm == math.inf
    settings = ["stages.0.max_steps=2", "tracking.enabled=false", "threads=1"]
    assert dqrm("pipeline", "run", "made.yaml", *settings).exit_code == 0
    again = dqrm("pipeline", "run", "made.yaml", *settings)
    assert again.exit_code == 0
    assert "complete before" in again.stdout
