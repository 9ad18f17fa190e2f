"""Folders of lowered models: read by transformers, equal to what was compressed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM, project
from dqrm.compress.grids.record import (
    WeightRecord,
    dequantize,
    fit,
    set_weight_record,
    weight_record,
)
from dqrm.compress.lower.folder import (
    encoder_bytes,
    pack_model,
    tensor_bytes,
    write_lowered,
)
from dqrm.compress.lower.modules import CodeEmbedding, Int8Linear
from dqrm.compress.lower.tensors import in_layers
from dqrm.compress.report import account
from dqrm.compress.transforms.activations import (
    QuantizeActivations,
    attach_activation_quantizer,
)
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.weights import QuantizeWeights
from dqrm.kernels.int8 import code_stack_reference

ROW = Granularity("row")


def compress(module, grid, bits, granularity=ROW, mask=None, activations=True):
    weight = module.weight.detach()
    kept = None if mask is None else mask.mask(weight)
    if mask is not None:
        weight = project(weight, mask)
    activation_bits = 8 if activations else 32
    if grid == "fp32":
        record = WeightRecord(grid, 32, granularity, torch.empty(0), mask, activation_bits)
    else:
        codes, scale = fit(weight, grid, bits, granularity, kept)
        record = WeightRecord(grid, bits, granularity, scale, mask, activation_bits)
        weight = dequantize(codes, record)
    module.weight.data = weight
    set_weight_record(module, record)
    if activations:
        attach_activation_quantizer(module, 8)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def tiny(
    kind=transformers.BertConfig, auto=transformers.AutoModelForSequenceClassification, **sizes
):
    torch.manual_seed(0)
    sizes = sizes or SIZES
    config = kind(vocab_size=40, max_position_embeddings=64, num_labels=3, **sizes)
    return auto.from_config(config).eval()


def inputs():
    torch.manual_seed(1)
    ids = torch.randint(5, 40, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def mixed():
    """Every grid somewhere: tables, patterns, groups, layers whose inputs stay as they are."""
    model = tiny()
    base = model.bert
    compress(base.embeddings.word_embeddings, "symmetric", 4, activations=False)
    compress(base.embeddings.position_embeddings, "ternary", 2, activations=False)
    first, second = base.encoder.layer
    for name in ("query", "key", "value"):
        compress(getattr(first.attention.self, name), "symmetric", 8)
        compress(getattr(second.attention.self, name), "ternary", 2, Granularity("tensor"))
    compress(first.attention.output.dense, "symmetric", 8, ROW, NM(2, 4))
    compress(first.intermediate.dense, "symmetric", 4, Granularity("k_groups", 8))
    compress(first.output.dense, "symmetric", 3, Granularity("row_groups", 4))
    compress(second.attention.output.dense, "binary", 1)
    compress(second.intermediate.dense, "fp32", 32, ROW, NM(1, 4), activations=False)
    compress(second.output.dense, "fp32", 32)
    return model


@pytest.fixture(scope="module")
def folder(mixed, tmp_path_factory):
    path = tmp_path_factory.mktemp("lowered") / "model"
    write_lowered(mixed, path)
    return path


@pytest.fixture
def tiny_bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "one"]
    return transformers.BertTokenizerFast(vocab={word: n for n, word in enumerate(words)})


def load(folder, target=None):
    from dqrm.compress.lower.hf import load_lowered

    return load_lowered(folder, target)


def test_asymmetric_grids_are_packed_and_read_and_say_what_is_not_integers(tmp_path, caplog):
    model = tiny()
    match = r"bert\.encoder\.layer\.{}\..*(query|key|value|dense)"
    compression = Compression(
        [
            QuantizeWeights([match.format(0), r".*word_embeddings"], 8, ROW, "asymmetric"),
            QuantizeWeights([match.format(1)], 4, ROW, "asymmetric"),
            QuantizeActivations([match.format(0)], grid="asymmetric"),
            QuantizeActivations([match.format(1)]),
        ]
    )
    compression.attach(model, 1)
    compression.freeze()
    write_lowered(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    zeros = {name: tensor for name, tensor in stored.items() if name.endswith("weight_zero")}
    assert len(zeros) == 13
    assert all(tensor.dtype == torch.uint8 for tensor in zeros.values())
    with torch.no_grad():
        wanted = model(**inputs()).logits
        assert torch.equal(load(tmp_path, "fp32")(**inputs()).logits, wanted)
        with caplog.at_level("WARNING", logger="dqrm"):
            runs = load(tmp_path, "int8")
        assert (runs(**inputs()).logits - wanted).abs().max() < 0.02
    assert "6 layers run in FP32, not on integers: inputs are on asymmetric grids" in caplog.text
    layers = runs.bert.encoder.layer
    assert isinstance(runs.bert.embeddings.word_embeddings, CodeEmbedding)
    assert isinstance(layers[0].output.dense, nn.Linear)
    assert isinstance(layers[1].output.dense, Int8Linear)


def test_fp32_is_the_compressed_model_bit_for_bit(mixed, folder):
    read = load(folder, "fp32")
    with torch.no_grad():
        assert torch.equal(read(**inputs()).logits, mixed(**inputs()).logits)
    for name, module in mixed.named_modules():
        record, found = weight_record(module), weight_record(read.get_submodule(name))
        if record is not None:
            assert torch.equal(read.get_submodule(name).weight, module.weight)
            assert (found.grid, found.bits, found.mask) == (record.grid, record.bits, record.mask)
    again = pack_model(read)
    assert again.keys() == pack_model(mixed).keys()


def test_integers_and_bf16_are_near_it(mixed, folder):
    with torch.no_grad():
        wanted = mixed(**inputs()).logits
        integers = load(folder)
        got = integers(**inputs()).logits
        # A rounding within a layer may carry an input of the next to the neighbouring code.
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3)
        half = load(folder, "bf16")
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half(**inputs()).logits.float(), wanted, rtol=0, atol=3e-2)
    kinds = {type(integers.get_submodule(name)) for name in pack_model(mixed)}
    assert kinds == {Int8Linear, CodeEmbedding, nn.Linear}
    assert integers.bert.encoder.layer[0].attention.self.query.shared is not None


class Reference(nn.Module):
    """An integer layer by its definition, in torch's operators."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.layer()

    def forward(self, x):
        rows = code_stack_reference(x.reshape(-1, x.shape[-1]), [self.layer])
        return rows.view(*x.shape[:-1], -1)


def test_integer_layers_are_their_definition_bit_for_bit(folder):
    integers = load(folder)
    defined = load(folder)
    for name, module in list(defined.named_modules()):
        if isinstance(module, Int8Linear):
            defined.set_submodule(name, Reference(module))
    with torch.no_grad():
        assert torch.equal(integers(**inputs()).logits, defined(**inputs()).logits)


def test_the_readmes_lines_read_it(folder, tiny_bert_tokenizer):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from dqrm.compress.lower.hf.*?)```", text, re.DOTALL)
    named = "runs/reviews/stages/lower/model"
    assert named in lines
    tiny_bert_tokenizer.save_pretrained(folder)
    found = {}
    exec(lines.replace(named, str(folder)), found)
    assert found["probabilities"].shape == (2, 3)
    torch.testing.assert_close(found["probabilities"].sum(-1), torch.ones(2))


def test_transformers_reads_it_after_one_import(mixed, folder):
    import dqrm.compress.lower.hf  # noqa: F401

    read = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(read(**inputs()).logits, load(folder)(**inputs()).logits)
    # A type for the whole model does not reach scales and integers.
    typed = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.bfloat16
    )
    with torch.no_grad():
        assert torch.equal(typed(**inputs()).logits, read(**inputs()).logits)
    with pytest.raises(ValueError, match="not serializable"):
        read.save_pretrained(folder.parent / "again")


def test_tensors_and_bytes_are_those_of_the_packed_weights(mixed, folder, tmp_path):
    packed = write_lowered(mixed, tmp_path / "plain", shrink=False)
    for path, weights in ((folder, pack_model(mixed)), (tmp_path / "plain", packed)):
        tensors = load_file(path / "model.safetensors")
        sizes = tensor_bytes(path)
        assert sizes == {name: tensor.nbytes for name, tensor in tensors.items()}
        dense = {
            name: tensor.nbytes
            for name, tensor in mixed.state_dict().items()
            if name.removesuffix(".weight") not in weights
        }
        assert sum(sizes.values()) == sum(w.nbytes for w in weights.values()) + sum(dense.values())
        layers = sum(w.nbytes for name, w in weights.items() if ".layer." in name)
        layers += sum(size for name, size in dense.items() if ".layer." in name)
        assert encoder_bytes(path) == layers
    assert encoder_bytes(folder) <= encoder_bytes(tmp_path / "plain")
    accounted = account(mixed)
    assert accounted.stored_bytes == sum(tensor_bytes(tmp_path / "plain").values())
    assert account(mixed, layers_only=True).stored_bytes == encoder_bytes(tmp_path / "plain")


OTHERS = {
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "Roberta": SIZES,
    "ModernBert": {**SIZES, "pad_token_id": 0, "bos_token_id": 2},
    "Funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind, tmp_path):
    model = tiny(getattr(transformers, f"{kind}Config"), **OTHERS[kind])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (in_layers(name) or "classif" in name):
            compress(module, "symmetric", 8)
        elif isinstance(module, nn.Embedding) and ("tok" in name or "word" in name):
            compress(module, "symmetric", 8, activations=False)
    write_lowered(model, tmp_path)
    with torch.no_grad():
        wanted = model(**inputs()).logits
        torch.testing.assert_close(load(tmp_path)(**inputs()).logits, wanted, rtol=0, atol=5e-3)
        assert torch.equal(load(tmp_path, "fp32")(**inputs()).logits, wanted)


BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
}
SHARED, ENCODER, DECODER = TABLES = (
    "model.shared",
    "model.encoder.embed_tokens",
    "model.decoder.embed_tokens",
)


@pytest.mark.parametrize(
    ("packed", "stored"),
    [
        ([], SHARED),
        ([SHARED], ENCODER),
        ([DECODER], SHARED),
        ([ENCODER, DECODER], SHARED),
        (TABLES, None),
    ],
)
def test_tied_tensors_are_stored_once(packed, stored, tmp_path):
    model = tiny(transformers.BartConfig, **BART)
    for name in packed:
        compress(model.get_submodule(name), "symmetric", 8, activations=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            compress(module, "symmetric", 8)
    write_lowered(model, tmp_path, shrink=False)
    tensors = load_file(tmp_path / "model.safetensors")
    assert [name for name in TABLES if f"{name}.weight" in tensors] == [stored] * bool(stored)
    assert account(model).stored_bytes == sum(tensor_bytes(tmp_path).values())
    batch = inputs()
    # The head reads the hidden state of the last eos.
    batch["input_ids"][:, 3] = model.config.eos_token_id
    read = load(tmp_path, "fp32")
    dense = [read.get_submodule(name).weight for name in TABLES if name not in packed]
    assert all(table is dense[0] for table in dense)
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.equal(read(**batch).logits, wanted)
        torch.testing.assert_close(load(tmp_path)(**batch).logits, wanted, rtol=0, atol=5e-2)


def test_a_model_without_a_head(tmp_path):
    model = tiny(auto=transformers.AutoModel)
    compress(model.encoder.layer[1].output.dense, "symmetric", 8)
    write_lowered(model, tmp_path)
    with torch.no_grad():
        got = load(tmp_path, "fp32")(**inputs()).last_hidden_state
        assert torch.equal(got, model(**inputs()).last_hidden_state)


def test_what_cannot_be_lowered_or_read_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing to run on integers"):
        write_lowered(tiny(), tmp_path / "plain")
    tiny().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="its weights are not packed by dqrm"):
        load(tmp_path / "dense")
    with pytest.raises(ValueError, match="no lowered model can be read"):
        load(tmp_path / "absent")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.key.weight_codes"
    save_file(tensors | {name: tensors[name][:-1]}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer.0.attention.self.key: "):
        load(broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["target"] = "int3"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="target=int3: must be int8, bf16, fp32"):
        load(broken)
