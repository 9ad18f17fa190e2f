"""Transformers whose layers differ in width: saved, loaded, trained on, cut again."""

import copy
import json

import pytest
import torch
import transformers

from dqrm.compress.lower.shapes import NoHeads, keep_units, layer_units, record_shapes
from dqrm.pipelines.text.classifier import (
    load_any,
    load_classifier,
    load_skeleton,
    save_classifier,
)
from dqrm.pipelines.text.layers import keep_layers
from dqrm.pipelines.text.tables import Labels

SHAPES = {"heads": [2, 0, 4], "neurons": [32, 16, 0]}


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def whole(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def cut(model):
    layers = layer_units(model)
    neurons = torch.arange(64)
    keep_units(layers[0], torch.tensor([True, False, True, False]), neurons % 2 == 0)
    keep_units(layers[1], torch.zeros(4, dtype=torch.bool), neurons < 16)
    keep_units(layers[2], torch.ones(4, dtype=torch.bool), neurons < 0)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_a_cut_model_answers_as_one_with_zeros_and_comes_back_from_disk(kind, tmp_path):
    model = whole(kind)
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        first, second, third = layer_units(zeros)
        first.attention_output.dense.weight[:, 8:16] = 0
        first.attention_output.dense.weight[:, 24:] = 0
        first.output.dense.weight[:, 1::2] = 0
        second.attention_output.dense.weight.zero_()
        second.output.dense.weight[:, 16:] = 0
        third.output.dense.weight.zero_()
    cut(model)
    wanted = model(**inputs()).logits
    torch.testing.assert_close(wanted, zeros(**inputs()).logits, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in zeros.parameters())

    save_classifier(model, NoTokenizer(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruned_shapes"] == SHAPES
    loaded = load_any(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**inputs()).logits, wanted)
    assert isinstance(layer_units(loaded)[1].attention, NoHeads)
    skeleton = load_skeleton(tmp_path)
    shapes = {name: p.shape for name, p in loaded.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes
    assert next(skeleton.parameters()).is_meta

    # Another head, one more training step, saved again: widths travel along.
    other = load_classifier(tmp_path, Labels(("a", "b", "c")), 0)
    other(**inputs()).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters() if p.grad is not None)
    save_classifier(other, NoTokenizer(), tmp_path / "again")
    again = load_any(tmp_path / "again")
    for (name, left), right in zip(other.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_layers_are_taken_out_of_a_cut_model(tmp_path):
    model = whole("Bert")
    cut(model)
    keep_layers(model, [0, 2])
    save_classifier(model, NoTokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pruned_shapes"] == {"heads": [2, 4], "neurons": [32, 0]}
    assert torch.equal(load_any(tmp_path).eval()(**inputs()).logits, model(**inputs()).logits)


def test_a_whole_model_says_nothing_and_damage_is_told(tmp_path):
    model = whole("Bert")
    save_classifier(model, NoTokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "pruned_shapes" not in config
    for shapes, message in (
        ({"heads": [4, 4], "neurons": [64, 64, 64]}, "is of 2 and 3 layers, the model has 3"),
        ({"heads": [4, 5, 4], "neurons": [64, 64, 64]}, "5 heads and 64 neurons for a layer of 4"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_shapes": shapes}))
        with pytest.raises(ValueError, match=message):
            load_any(tmp_path)
    gpt = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=2, num_labels=2, pad_token_id=0
    )
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification: its layers are not built"):
        layer_units(transformers.GPT2ForSequenceClassification(gpt))


@pytest.mark.parametrize("match", [".*encoder.*", ".*output.dense"], ids=["all", "some"])
def test_a_cut_model_is_lowered(match, tmp_path):
    import dqrm.compress.lower.hf as hf
    from dqrm.compress.lower.folder import write_lowered
    from dqrm.compress.transforms.config import ActivationGrid, QuantTransform, WeightGrid
    from dqrm.pipelines.text.reconstruction import resolve_targets, round_weights

    model = whole("Bert")
    cut(model)
    record_shapes(model)
    grids = QuantTransform(
        kind="quant", match=match, weight=WeightGrid(bits=8), act=ActivationGrid()
    )
    round_weights(model, resolve_targets(model, [grids]))
    write_lowered(model, tmp_path)
    loaded = hf.load_lowered(tmp_path)
    torch.testing.assert_close(
        loaded(**inputs()).logits, model(**inputs()).logits, rtol=1e-4, atol=1e-4
    )


def test_a_model_trained_after_it_was_cut_is_lowered(tmp_path):
    """Training, unlike rounding, puts the matrices that lost all rows or columns on grids, too."""
    import dqrm.compress.lower.hf as hf
    from dqrm.compress.grids.record import weight_record
    from dqrm.compress.lower.folder import write_lowered
    from dqrm.compress.lower.modules import Int8Linear
    from dqrm.compress.transforms.build import build_compression
    from dqrm.compress.transforms.config import ActivationGrid, QuantTransform, WeightGrid

    model = whole("Bert")
    cut(model)
    record_shapes(model)
    grids = QuantTransform(
        kind="quant",
        match=".*encoder.*(query|key|value|dense)",
        weight=WeightGrid(bits=4),
        act=ActivationGrid(),
    )
    compression = build_compression([grids])
    compression.attach(model, 1)
    compression.freeze()
    empty = [
        name
        for name, module in model.named_modules()
        if weight_record(module) is not None and not module.weight.numel()
    ]
    layer = "bert.encoder.layer"
    assert empty == [
        f"{layer}.1.attention.output.dense",
        f"{layer}.2.intermediate.dense",
        f"{layer}.2.output.dense",
    ]
    write_lowered(model, tmp_path)
    wanted = model(**inputs()).logits
    for target, off in (("fp32", 1e-5), ("int8", 5e-3), ("bf16", 5e-2)):
        loaded = hf.load_lowered(tmp_path, target)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs()).logits.float(), wanted, rtol=0, atol=off)
        integers = [n for n, m in loaded.named_modules() if isinstance(m, Int8Linear)]
        # All six, the feed-forward matrices alone, and those of attention alone.
        assert len(integers) == (6 + 2 + 4 if target == "int8" else 0)
        assert not {*integers} & {*empty}
