"""Models that a text stage is given: whole ones, and ones that lack a part."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dqrm.compress.lower.hf import load_lowered
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.classifier import (
    bf16_is_fast,
    load_any,
    load_classifier,
    load_teacher,
    load_tokenizer,
    predict_text,
    save_classifier,
)
from dqrm.pipelines.text.positions import check_length, longest_input
from dqrm.pipelines.text.tables import Labels, find_columns, read_table, take_examples

TWO = Labels(("0", "1"))


@pytest.fixture
def copy_of(tiny_bert):
    """Copy the headless model, with other tensors; returns its folder."""

    def copy(name, edit):
        folder = Path(shutil.copytree(tiny_bert, name))
        tensors = edit(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_encoders_that_are_not_whole_are_refused(copy_of):
    part = copy_of("part", lambda all_: {k: v for k, v in all_.items() if "layer.1." not in k})
    alien = copy_of("alien", lambda all_: {f"foo.{k}": v for k, v in all_.items()})
    name = "encoder.layer.0.output.dense.weight"
    other = copy_of("other", lambda all_: {**all_, name: all_[name][:, :8].contiguous()})
    for folder, message in (
        (part, r"16 missing or .*: (bert\.)?encoder.layer.1.attention.*, \.\.\."),
        (alien, r"3[79] missing"),
        (other, rf"1 missing or of another shape: (bert\.)?{name}$"),
    ):
        for load in (load_any, lambda folder: load_classifier(folder, TWO, 0)):
            with pytest.raises(ValueError, match=f"^{folder}: .*{message}"):
                load(folder)


def test_heads_and_poolers_are_made_anew_but_not_for_a_teacher(copy_of):
    folder = copy_of("bare", lambda all_: {k: v for k, v in all_.items() if "pooler" not in k})
    load_any(folder)
    model = load_classifier(folder, TWO, 0)
    model.save_pretrained("two")
    three = load_classifier(Path("two"), Labels(("a", "b", "c")), 0)
    assert three.classifier.out_features == 3
    torch.testing.assert_close(three.bert.state_dict(), model.bert.state_dict())
    load_teacher(Path("two"), TWO)

    tensors = load_file("two/model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, "two/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing .*: classifier\.weight$"):
        load_teacher(Path("two"), TWO)


def test_damaged_weights_are_named(tiny_bert, sentence_files, dqrm):
    file = Path(shutil.copytree(tiny_bert, "cut")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for load in (load_any, load_lowered, lambda folder: load_classifier(folder, TWO, 0)):
        with pytest.raises(ValueError, match=f"^cut: .*{file} is damaged"):
            load(Path("cut"))
    done = dqrm("profile", "cut")
    assert done.exit_code == 2
    assert f"{file} is damaged" in done.stderr
    Path("cut.yaml").write_text(
        "tracking: {enabled: false}\nstages:\n"
        f"  - {{stage: finetune, model: cut, data: {{train: {sentence_files}/train.tsv}}}}\n"
    )
    done = dqrm("pipeline", "run", "cut.yaml")
    assert done.exit_code == 2
    assert f"{file} is damaged" in done.stderr


def test_positions_that_a_model_has():
    for kind, longest in (("Bert", 16), ("Roberta", 14)):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        assert longest_input(model) == longest
        model(input_ids=torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))
        with pytest.raises(ValueError, match=f"max_length=17: the model takes up to {longest}"):
            check_length(model, 17)
    endless = transformers.XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=64)
    assert longest_input(transformers.XLNetModel(endless)) is None


CHAIN = """\
tracking: {{enabled: false}}
data: {{train: {text}/train.tsv}}
stages:
  - {{stage: finetune, model: {model}}}
  - {{stage: prune, model: 'stage:finetune', budget: {{macs: 0.5}}, held_out: 32}}
  - stage: compress
    model: stage:finetune
    distill: {{teacher: stage:finetune}}
    transforms: [{{kind: quant, match: '.*dense', weight: {{bits: 8}}}}]
  - {{stage: lower, model: 'stage:compress', buckets: [[1, 16]]}}
"""


@pytest.mark.parametrize("stage", ["finetune", "prune", "compress", "lower"])
def test_sentences_longer_than_the_model_takes_show_before_it_runs(
    stage, tiny_bert, sentence_files, dqrm
):
    Path("chain.yaml").write_text(CHAIN.format(model=tiny_bert, text=sentence_files))
    longest = dqrm("pipeline", "validate", "chain.yaml", f"stages.{stage}.max_length=128")
    assert longest.exit_code == 0, longest.stderr
    done = dqrm("pipeline", "validate", "chain.yaml", f"stages.{stage}.max_length=129")
    assert done.exit_code == 2
    assert f"stages.{stage}.max_length: max_length=129: the model takes up to 128" in done.stderr


NAMED = """\
tracking: {enabled: false}
data: {train: named.tsv, dev: named.tsv}
stages:
  - {stage: finetune, model: named, max_steps: 1, lr: 1e-9, precision: fp32}
  - stage: reconstruct
    model: named
    transforms: [{kind: quant, match: '.*layer.*dense', weight: {bits: 8}}]
  - {stage: lower, model: named, target: fp32, buckets: [[1, 8]], seconds: 1e-6}
"""


def test_classes_are_in_the_order_of_the_models_outputs(tiny_bert, sentence_files):
    model = load_classifier(tiny_bert, Labels(("positive", "negative")), 0)
    tokenizer = load_tokenizer(tiny_bert)
    table = read_table(sentence_files / "dev.tsv.gz")
    examples = take_examples(table, find_columns(table, "t"), "t")
    logits = predict_text(model, EncodedText(tokenizer, examples, 128), 32)
    with torch.no_grad():
        model.classifier.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    chosen = predict_text(model, EncodedText(tokenizer, examples, 128), 32).argmax(1)
    named = [model.config.id2label[int(place)] for place in chosen]
    assert {*named} == {"positive", "negative"}
    table.assign(label=named).to_csv("named.tsv", sep="\t", index=False)
    save_classifier(model, tokenizer, Path("named"))

    Path("named.yaml").write_text(NAMED)
    for stage in run_pipeline(load_pipeline(Path("named.yaml"))).stages:
        assert stage.record.metrics["best/val_accuracy"] > 0.9, stage.key
        read = load_any(stage.folder / "model")
        assert read.config.id2label == {0: "positive", 1: "negative"}


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Neoverse-V1", "bf16": True}, True),
    ],
)
def test_bf16_is_taken_where_it_is_faster(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bf16_is_fast() is fast
