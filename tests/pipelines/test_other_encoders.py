"""Stages on transformers that are not built as BERT is: what works, and what is told at once."""

import json
import re

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.text.classifier import load_any

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS = {
    "Albert": {**SIZES, "embedding_size": 16, "num_hidden_layers": 3},
    "Bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 3,
    },
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "DebertaV2": {**SIZES, "num_hidden_layers": 2},
    "MobileBert": {
        **SIZES,
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "num_hidden_layers": 2,
        "num_feedforward_networks": 2,
    },
    "Qwen2": {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": None},
}
"""Of tiny models, by what transformers calls them; eos is the tokenizer's [SEP]."""

STAGES = """\
threads: 1
output: {output}
tracking: {{enabled: false}}
data: {{train: {folder}/rows.tsv, dev: {folder}/rows.tsv}}
stages:
"""


@pytest.fixture
def made(tiny_bert, tmp_path):
    """Makes a model without a head, beside the vocabulary of tiny_bert and a table of 24 rows."""

    def make(kind, **others):
        settings = {"vocab_size": 40, "pad_token_id": 0, **CONFIGS[kind], **others}
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        folder = tmp_path / kind
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
        texts = [f"w{n} w{n % 5} w{n % 7}" for n in range(24)]
        frame = pd.DataFrame({"sentence": texts, "label": [0, 1] * 12})
        frame.to_csv(folder / "rows.tsv", sep="\t", index=False)
        return folder

    return make


@pytest.fixture
def pipeline(tmp_path):
    """Writes a pipeline of the stages given; returns its file."""

    def write(folder, *stages):
        file = tmp_path / "small.yaml"
        head = STAGES.format(output=tmp_path / "runs", folder=folder)
        file.write_text(head + "".join(f"  - {{{stage}}}\n" for stage in stages))
        return file

    return write


def compress(folder, match, *others):
    transform = f"kind: quant, match: '{match}', weight: {{bits: 8}}, act: {{bits: 8}}"
    settings = ("epochs: 1, batch_size: 8, precision: fp32", *others)
    return f"stage: compress, model: {folder}, {', '.join(settings)}, transforms: [{{{transform}}}]"


@pytest.mark.parametrize(
    ("kind", "match", "layers"),
    [
        ("Albert", r"albert\.encoder\..*", ".albert_layer_groups."),
        ("Bart", r"model\..*(proj|fc\d)", ".layers."),
    ],
)
def test_bytes_of_layers_that_are_no_one_list(made, pipeline, dqrm, kind, match, layers):
    folder = made(kind)
    file = pipeline(folder, compress(folder, match))
    plan = dqrm("pipeline", "run", file, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    (stage,) = run_pipeline(load_pipeline(file)).stages
    metrics = stage.record.metrics
    tensors = load_file(stage.folder / "model" / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert metrics["size/encoder_fp32_bytes"] == sum(
        size for name, size in sizes.items() if layers in name
    )
    assert metrics["size/encoder_packed_bytes"] < 0.4 * metrics["size/encoder_fp32_bytes"]
    assert f"encoder         {int(metrics['size/encoder_packed_bytes']):,} bytes" in plan.stdout


def test_what_needs_one_list_of_layers_is_told_at_once(made, pipeline, dqrm):
    folder = made("Albert")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["AlbertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    match = r"albert\.encoder\..*"
    reconstruct = (
        f"stage: reconstruct, model: {folder}, solver: lkd,"
        f" transforms: [{{kind: quant, match: '{match}', weight: {{bits: 8}}}}]"
    )
    schedule = "{start: 9, period: 1, sensitivity: eigenvalue}"
    for stage, field in (
        (compress(folder, match, "layers: 2"), "compress.layers"),
        (compress(folder, match).replace("}, act:", f"}}, schedule: {schedule}, act:"),
         "compress.transforms"),
        (reconstruct, "reconstruct.solver"),
    ):  # fmt: skip
        done = dqrm("pipeline", "validate", pipeline(folder, stage))
        assert done.exit_code == 2, stage
        assert f"{field}: AlbertForSequenceClassification: no list of 3 layers" in done.stderr
    rounded = dqrm("pipeline", "validate", pipeline(folder, reconstruct.replace("lkd", "none")))
    assert rounded.exit_code == 0, rounded.stderr


def test_a_decoder_takes_its_padding_from_the_tokenizer(made, pipeline, dqrm):
    folder = made("Qwen2")
    assert load_any(folder).config.pad_token_id is None
    short = "epochs: 1, batch_size: 8, precision: fp32"
    lower = "stage: lower, model: stage:compress, target: int8, buckets: [[2, 8]], seconds: 1e-6"
    file = pipeline(
        folder,
        f"stage: finetune, model: {folder}, {short}",
        compress("stage:finetune", r"model\.layers\..*", "distill: {teacher: 'stage:finetune'}"),
        lower,
    )
    plan = dqrm("pipeline", "run", file, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    finetune, _, lowered = run_pipeline(load_pipeline(file)).stages
    assert load_any(finetune.folder / "model").config.pad_token_id == 0
    assert lowered.record.metrics["lower/same_answers"] > 0.9

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    file = pipeline(
        folder, f"stage: finetune, model: {folder}", lower.replace("compress", "finetune")
    )
    done = dqrm("pipeline", "validate", file)
    assert done.exit_code == 2
    message = "no token pads; name one in tokenizer_config.json, as pad_token"
    assert re.search(rf"stages\.finetune\.model: .*{message}", done.stderr)


@pytest.mark.parametrize("kind", ["DistilBert", "DebertaV2", "MobileBert"])
def test_what_cannot_be_pruned_is_told_at_once(made, pipeline, dqrm, kind):
    folder = made(kind)
    file = pipeline(
        folder,
        f"stage: finetune, model: {folder}",
        "stage: prune, model: stage:finetune, budget: {macs: 0.7}",
    )
    done = dqrm("pipeline", "validate", file)
    assert done.exit_code == 2
    told = f"prune.model: {kind}ForSequenceClassification: its layers are not built as BERT's are"
    assert told in done.stderr
    assert "those that can be pruned are BERT, RoBERTa" in done.stderr
