"""The network: names, shapes, initialisation and the reference interaction."""

import pytest
import torch

from dqrm.compress.config import QuantConfig
from dqrm.compress.linear import QuantLinear
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.models.interaction import DotInteraction

TABLES = [("a", 7), ("b", 20)]


def build(model=None, quant=None):
    torch.manual_seed(0)
    return build_dlrm(
        ModelConfig.model_validate(model or {}),
        QuantConfig.model_validate(quant or {}),
        num_dense=3,
        tables=TABLES,
    )


def test_parameters_have_the_reference_names():
    model = build({"bottom_mlp": [8], "top_mlp": [6], "dropout": 0.5})
    assert [name for name, _ in model.named_parameters()] == [
        "bot_l.0.weight",
        "bot_l.0.bias",
        "bot_l.2.weight",
        "bot_l.2.bias",
        "emb_l.weight",
        "top_l.0.weight",
        "top_l.0.bias",
        "top_l.2.weight",
        "top_l.2.bias",
    ]


@pytest.mark.parametrize("itself", [False, True])
def test_dot_interaction_equals_the_reference_loops(itself):
    torch.manual_seed(0)
    dense, pooled = torch.randn(5, 4), torch.randn(5, 3, 4)
    vectors = [dense, *pooled.unbind(1)]
    offset = 1 if itself else 0
    expected = [(vectors[i] * vectors[j]).sum(dim=1) for i in range(4) for j in range(i + offset)]
    out = DotInteraction(4, itself=itself)(dense, pooled)
    torch.testing.assert_close(out, torch.cat([dense, torch.stack(expected, 1)], 1))


@pytest.mark.parametrize("pooled_dtype", [torch.bfloat16, torch.float32])
def test_dot_interaction_answers_in_the_dtype_of_the_dense_vector(pooled_dtype):
    torch.manual_seed(0)
    dense, pooled = torch.randn(5, 4).bfloat16(), torch.randn(5, 3, 4).to(pooled_dtype)
    out = DotInteraction(4)(dense, pooled)
    assert out.dtype == torch.bfloat16
    expected = DotInteraction(4)(dense.double(), pooled.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "model",
    [{}, {"interaction": "cat"}, {"interaction_itself": True}, {"bottom_mlp": [], "top_mlp": []}],
    ids=str,
)
def test_one_logit_per_row_and_gradients_everywhere(model):
    network = build(model)
    logits = network(torch.rand(4, 3), torch.randint(0, 7, (8,)))
    assert logits.shape == (4,)
    logits.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


def test_initialisation_has_the_reference_variances():
    model = build({"bottom_mlp": [400], "embedding_dim": 300})
    weight, bias = model.bot_l[2].weight, model.bot_l[2].bias
    assert weight.std().item() == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert bias.std().item() == pytest.approx((1 / 300) ** 0.5, rel=0.15)


def test_quantization_does_not_change_the_initial_weights():
    full, four = build(quant={"bits": 32, "mlp_bits": 32}), build()
    for (name, a), (_, b) in zip(full.named_parameters(), four.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_first_and_last_layer_can_stay_in_full_precision():
    model = build(quant={"skip_first_layer": True, "skip_last_layer": True})
    quantized = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
    assert quantized == ["bot_l.2", "bot_l.4", "bot_l.6", "top_l.0", "top_l.2"]


def test_bits_of_single_tables():
    model = build(quant={"table_bits": {"b": 8}})
    assert [table.bits for table in model.emb_l.tables] == [4, 8]
    with pytest.raises(ValueError, match=r"quant.table_bits names C3, but .* tables are a, b"):
        build(quant={"table_bits": {"C3": 8}})
