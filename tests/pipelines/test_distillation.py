"""A teacher and its student, both real BERTs, and layers taken out of one."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dqrm.compress.distill.losses import DistillWeights
from dqrm.pipelines.text.attention import use_plain_attention
from dqrm.pipelines.text.classifier import load_any, load_classifier, load_teacher
from dqrm.pipelines.text.layers import encoder_layers, keep_layers
from dqrm.pipelines.text.objective import Distillation, TaskLoss
from dqrm.pipelines.text.tables import Labels

ALL = DistillWeights(logits=1.0, hidden=1.0, attention=1.0)


@pytest.fixture
def classifier(bert_of_six):
    return load_classifier(bert_of_six, Labels(("0", "1")), seed=0)


@pytest.fixture
def batch():
    ids = torch.randint(5, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    mask[2, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def distillation(teacher, layers, *, weights=ALL, label_weight=0.0):
    return Distillation(
        teacher, weights, layers, label_weight=label_weight, regression=False, bf16=False
    )


def test_plain_attention_computes_what_the_fused_one_does(classifier, batch):
    fused = copy.deepcopy(classifier)
    fused.set_attn_implementation("sdpa")
    use_plain_attention(classifier)
    labels = torch.tensor([0, 1, 1])
    task = TaskLoss(regression=False, bf16=False)
    for model in (classifier, fused):
        model.eval()
        torch.autograd.backward(task(model, batch, labels))
    for (name, plain), other in zip(classifier.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(plain.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_student_that_is_the_teacher_has_no_loss(classifier, batch):
    teacher = copy.deepcopy(classifier)
    for model in (classifier, teacher):
        use_plain_attention(model)
    labels = torch.tensor([0, 1, 1])
    classifier.eval()
    loss = distillation(teacher, range(6))(classifier, batch, labels)
    assert float(loss.detach()) == 0.0
    with_labels = distillation(teacher, range(6), label_weight=2.0)
    task = TaskLoss(regression=False, bf16=False)(classifier, batch, labels)
    assert float(with_labels(classifier, batch, labels).detach()) == 2 * float(task.detach())
    with torch.no_grad():
        classifier.bert.encoder.layer[3].output.dense.weight.add_(0.1)
    loss = distillation(teacher, range(6))(classifier, batch, labels)
    torch.autograd.backward(loss)
    assert float(loss.detach()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_with_other_labels_is_refused(classifier, tmp_path):
    data = Labels(("negative", "positive"))
    for names, fault in (
        (
            ("Positive", "Negative"),
            r"another order .*\(positive, negative, not negative, positive\)",
        ),
        (("no", "maybe", "yes"), "it has 3 outputs, and the data 2"),
        (("NEGATIVE", "POSITIVE"), None),
        (("LABEL_0", "LABEL_1"), None),
    ):
        config = copy.deepcopy(classifier.config)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: output for output, name in enumerate(names)}
        type(classifier)(config).save_pretrained(tmp_path)
        if fault is None:
            assert load_teacher(tmp_path, data).config.num_labels == 2
        else:
            with pytest.raises(ValueError, match=rf"{tmp_path}: .*{fault}"):
                load_teacher(tmp_path, data)


def test_kept_layers_are_those_of_the_model(classifier, batch, tmp_path):
    whole = copy.deepcopy(classifier).eval()
    keep_layers(classifier, (0, 2, 5))
    assert classifier.config.num_hidden_layers == 3
    for ours, theirs in zip(encoder_layers(classifier), (0, 2, 5), strict=True):
        expected = encoder_layers(whole)[theirs].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())
    classifier.eval()
    with torch.no_grad():
        for position in (4, 3, 1):
            # Without effect: a layer of residuals alone would still normalize.
            whole.bert.encoder.layer[position].forward = lambda hidden, *args, **kwargs: hidden
        expected = whole(**batch).logits
        assert torch.equal(classifier(**batch).logits, expected)
        classifier.save_pretrained(tmp_path)
        assert torch.equal(load_any(tmp_path).eval()(**batch).logits, expected)
    with pytest.raises(ValueError, match="layer 3: there are 3, 0 to 2"):
        keep_layers(classifier, (0, 3))


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "types"),
    [
        (
            transformers.ModernBertConfig(**SIZES, local_attention=4, bos_token_id=2),
            ["full_attention", "sliding_attention", "full_attention"],
        ),
        (
            transformers.Qwen2Config(
                **SIZES,
                num_key_value_heads=2,
                sliding_window=2,
                use_sliding_window=True,
                max_window_layers=2,
            ),
            ["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ],
    ids=["ModernBert", "Qwen2"],
)
def test_settings_of_kept_layers_stay_theirs(config, types, batch, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    keep_layers(model, (0, 2, 3))
    assert model.config.layer_types == types
    model.save_pretrained(tmp_path)
    loaded = load_any(tmp_path).eval()
    assert loaded.config.layer_types == types
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_layers_that_would_come_back_as_others_are_told():
    modern = transformers.ModernBertConfig(**SIZES, bos_token_id=2)
    funnel = transformers.FunnelConfig(
        vocab_size=40, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=32
    )
    for config, message in (
        (modern, r"layer 1 would be layer 0, which has no attn_norm\.weight; keep layer 0"),
        (funnel, r"FunnelConfig: .* Please set `block_sizes`"),
    ):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            keep_layers(model, (1,))
        assert list(model.state_dict()) == before


def test_the_student_s_map_is_by_input_and_output_of_layers(classifier, batch):
    """A student that is the first layers of its teacher has their hidden states."""
    teacher = copy.deepcopy(classifier)
    keep_layers(classifier, (0, 1, 2))
    for model in (classifier, teacher):
        use_plain_attention(model)
    classifier.eval()
    layers = DistillWeights(logits=0.0, hidden=1.0, attention=1.0)
    labels = torch.tensor([0, 1, 1])
    loss = distillation(teacher, (0, 1, 2), weights=layers)(classifier, batch, labels)
    assert float(loss.detach()) == 0.0
    other = distillation(teacher, (0, 1, 3), weights=layers)(classifier, batch, labels)
    assert float(other.detach()) > 1e-4


def test_an_encoder_with_a_decoder_learns_from_logits(batch):
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, num_labels=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    teacher, student = (transformers.BartForSequenceClassification(config).eval() for _ in range(2))
    batch["input_ids"][:, 0] = config.eos_token_id
    logits = DistillWeights(logits=1.0, hidden=0.0, attention=0.0)
    loss = distillation(teacher, (), weights=logits)(student, batch, torch.tensor([0, 1, 1]))
    assert float(loss.detach()) > 0


TAUGHT = """\
tracking: {{enabled: false}}
data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz}}
stages:
  - stage: finetune
    model: {model}
    max_steps: 2
  - stage: compress
    layers: 1
    model: stage:finetune
    distill: {{teacher: 'stage:finetune'}}
"""


@pytest.fixture
def taught(tiny_bert, sentence_files):
    file = Path("taught.yaml")
    file.write_text(TAUGHT.format(model=tiny_bert, text=sentence_files))
    return file


def test_a_teacher_of_which_nothing_is_compared_is_refused(taught, dqrm):
    parts = [f"stages.compress.distill.{part}=0" for part in ("logits", "hidden", "attention")]
    done = dqrm("pipeline", "validate", taught, *parts)
    assert done.exit_code == 2
    assert "stages.compress.distill: there is nothing to learn from: set logits" in done.stderr
    for part in ("logits", "hidden", "attention", "labels"):
        one = f"stages.compress.distill.{part}=1"
        assert dqrm("pipeline", "validate", taught, *parts, one).exit_code == 0, part


def saved_classifier(folder, tiny_bert, **settings):
    """A classifier with random weights and the tokens of the tiny BERT."""
    config = transformers.AutoConfig.from_pretrained(tiny_bert, **settings)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def test_models_that_do_not_fit_the_data_or_each_other_show_before_it_runs(taught, tiny_bert, dqrm):
    for folder, settings in (
        ("two", {}),
        ("three", {"num_labels": 3}),
        ("wide", {"hidden_size": 48}),
    ):
        saved_classifier(folder, tiny_bert, **settings)
    saved_classifier("turned", tiny_bert, id2label={0: "1", 1: "0"})
    saved_classifier("part", tiny_bert)
    tensors = load_file("part/model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, "part/model.safetensors", metadata={"format": "pt"})
    lacks = "part: no sequence classifier can be read: its weights are not those of its config.json"
    model, teacher = "stages.compress.model", "stages.compress.distill.teacher"
    without = "stages.compress.distill.hidden=0"
    for overrides, line, message in (
        ((f"{model}=three",), 9, f"{model}: model=three: it has 3 outputs, and the data 2"),
        ((f"{model}=part",), 9, f"{model}: {lacks}"),
        ((f"{teacher}=part",), 10, f"{teacher}: {lacks}"),
        ((f"{teacher}=three",), 10, f"{teacher}: three: it has 3 outputs, and the data 2"),
        ((f"{teacher}=turned",), 10, f"{teacher}: turned: its outputs are in another order"),
        ((f"{teacher}={tiny_bert}",), 10, f"{teacher}: {tiny_bert}: BertModel has no head"),
        (
            (f"{teacher}=wide",),
            10,
            "stages.compress.distill.hidden: hidden states are compared value by value, and the "
            "model has 32 a token, the teacher 48: set distill.hidden to 0",
        ),
        ((f"{teacher}=wide", without), None, ""),
        ((f"{teacher}=two", f"{model}=turned"), None, ""),
        ((f"{model}=turned",), 10, f"{teacher}: stage:finetune: its outputs are in another"),
        (("stages.finetune.task=regression",), 9, f"{model}: model=stage:finetune: it has 1 out"),
        (
            ("stages.finetune.task=regression", f"{model}=two"),
            10,
            f"{teacher}: stage:finetune: it has 1 outputs, and the data 2",
        ),
    ):
        done = dqrm("pipeline", "validate", taught, *overrides)
        assert done.exit_code == (0 if line is None else 2), (overrides, done.stderr)
        if line is not None:
            assert f"taught.yaml:{line}: {message}" in done.stderr
            assert "faults" not in done.stderr, done.stderr
