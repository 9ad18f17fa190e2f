"""Rows kept in less than FP32: what a step writes, what is refused, and how many bytes remain."""

import pytest
import torch

from dqrm.compress import grids
from dqrm.compress.config import QuantConfig
from dqrm.kernels.tables import RowGradient
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.models.sizes import model_sizes
from dqrm.training.config import OptimConfig
from dqrm.training.optimizer import Optimizer

TABLES = [("a", 6), ("b", 3000)]
QUANT = {
    "fp32": {},
    "bf16": {"storage": "bf16"},
    "int8": {"storage": "int8", "bits": 8, "granularity": "row"},
    "int4": {"storage": "int4", "bits": 4, "granularity": "row"},
}
LOW = ["bf16", "int8", "int4"]


def setup(storage, dim=16, seed=0, quant=None, **optim):
    torch.manual_seed(seed)
    model = build_dlrm(
        ModelConfig(embedding_dim=dim, bottom_mlp=(5,), top_mlp=(6,)),
        QuantConfig.model_validate({**QUANT[storage], **(quant or {})}),
        num_dense=2,
        tables=TABLES,
    )
    return model, Optimizer(model, OptimConfig.model_validate(optim))


def values_of(model):
    return model.emb_l.storage.read(torch.arange(model.emb_l.num_rows))


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 6, (2 * 8,), generator=generator)
    model(torch.rand(8, 2, generator=generator), indices).square().sum().backward()


@pytest.mark.parametrize("storage", LOW)
def test_initial_rows_are_those_of_fp32_rounded(storage):
    full, _ = setup("fp32")
    low, _ = setup(storage)
    # At most a step: 1.25 / 7 of a row's largest magnitude at 4 bits.
    share = {"bf16": 2**-7, "int8": 1.26 / 127, "int4": 1.26 / 7}[storage]
    gap = (values_of(low) - full.emb_l.weight).abs()
    assert (gap <= share * full.emb_l.weight.abs().amax(dim=1, keepdim=True)).all()
    assert torch.equal(low.top_l[0].weight, full.top_l[0].weight)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("storage", LOW)
def test_the_mean_update_is_that_of_fp32(storage, name):
    """Equal rows with equal gradients are rounded apart; their mean must move as FP32 does."""
    rows = torch.arange(6, 3006)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(16, generator=generator).bfloat16().float()
    moved = {}
    for kind in ("fp32", storage):
        model, optimizer = setup(kind, name=name, embedding_weight_decay=0.1)
        emb = model.emb_l
        with torch.no_grad():
            emb.storage.write(rows, start.expand(3000, 16))
            before = values_of(model)[6:].mean(dim=0)
            for step in range(10):
                generator.manual_seed(step)
                gradient = torch.randn(16, generator=generator).expand(3000, 16)
                optimizer.rows.step(RowGradient(rows, gradient), 0.01)
        moved[kind] = values_of(model)[6:].mean(dim=0) - before
    # An element of a row takes ten roundings, of at most half a step's deviation each.
    step = float(start.abs().max()) * {"bf16": 2**-7, "int8": 1.26 / 127, "int4": 1.26 / 7}[storage]
    bound = 5 * step * 0.5 * (10 / 3000) ** 0.5
    # Adaptive rates see rounded state, a relative error of 2**-8 at most.
    bound += 0.1 * 2**-8 if name != "sgd" else 0
    assert (moved[storage] - moved["fp32"]).abs().max() < bound


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("storage", LOW)
def test_rows_without_gradient_and_rows_at_rate_zero_keep_their_bits(storage, name):
    model, optimizer = setup(storage, name=name)
    before = model.emb_l.weight.clone()
    gradient = RowGradient(torch.tensor([1, 7]), torch.ones(2, 16))
    optimizer.rows.step(gradient, 0.5)
    changed = (model.emb_l.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [1, 7]
    before = model.emb_l.weight.clone()
    optimizer.rows.step(gradient, 0.0)
    assert torch.equal(model.emb_l.weight, before)


def test_rounding_differs_by_step_and_by_seed():
    gradient = RowGradient(torch.arange(3006), torch.full((3006, 16), 1e-3))
    results = []
    for seed, steps in [(0, 1), (0, 2), (1, 1)]:
        model, optimizer = setup("int8", seed=seed, name="sgd")
        model.emb_l.storage.write(torch.arange(3006), torch.ones(3006, 16) * 0.5)
        for _ in range(steps - 1):
            optimizer.rows.step(RowGradient(torch.tensor([0]), torch.zeros(1, 16)), 0.0)
        optimizer.rows.step(gradient, 0.1)
        results.append(model.emb_l.weight.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_forward_is_the_stored_rows_themselves(storage):
    model, optimizer = setup(storage, name="sgd", lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(step)
    indices = torch.tensor([3, 0, 5, 5, 2, 1])
    out = model.emb_l(indices)
    codes, steps = model.emb_l.codes(1)
    expected = grids.dequantize(codes, steps[:, None])[indices[3:]]
    assert torch.equal(out[:, 1], expected)
    assert expected.abs().max() > 0


def test_bf16_rows_are_fake_quantized_with_exact_scales():
    model, optimizer = setup("bf16", name="sgd", lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(step)
    largest = torch.stack([rows.abs().max() for rows in model.emb_l.table_rows()]).float()
    assert torch.equal(model.emb_l.table_scale, largest / 7)
    values = model.emb_l(torch.tensor([0, 1, 2, 3]))
    codes = values / model.emb_l.table_scale[:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-5)


def test_packing_by_blocks_equals_packing_at_once(monkeypatch):
    for storage in QUANT:
        model, _ = setup(storage)
        whole = model.emb_l.packed(1)
        monkeypatch.setattr("dqrm.models.embedding.ROWS_AT_ONCE", 999)
        for left, right in zip(whole, model.emb_l.packed(1), strict=True):
            assert torch.equal(left, right)
        monkeypatch.undo()


@pytest.mark.parametrize("storage", LOW)
def test_gradients_are_clipped(storage):
    model, optimizer = setup(storage, name="sgd", lr=1.0, clip_norm=1e-20)
    before = model.emb_l.weight.clone()
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step(0)
    assert torch.equal(model.emb_l.weight, before)


@pytest.mark.parametrize("dim", [4, 5, 16, 64])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("storage", list(QUANT))
def test_bytes_in_training_are_those_computed_beforehand(storage, name, dim):
    model, optimizer = setup(storage, dim, name=name)
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step(0)
    config = ModelConfig(embedding_dim=dim, bottom_mlp=(5,), top_mlp=(6,))
    quant = QuantConfig.model_validate(QUANT[storage])
    sizes = model_sizes(config, quant, optimizer.config, num_dense=2, tables=TABLES)
    tensors = [*model.parameters(), *optimizer.state().values()]
    tensors += [] if storage == "fp32" else [model.emb_l.weight]
    counters = [t for t in optimizer.state().values() if t.dim() == 0]
    expected = sum(t.nbytes for t in tensors) - sum(t.nbytes for t in counters)
    assert sizes.training_bytes == expected + model.emb_l.kernel.maxima_bytes


def test_int8_rows_take_under_30_percent_of_fp32():
    def table_bytes(storage, name):
        tables = [("a", 10**6)]
        quant = QuantConfig.model_validate(QUANT[storage] if storage != "fp32" else {"bits": 32})
        config = ModelConfig(bottom_mlp=(), top_mlp=())
        optim = OptimConfig.model_validate({"name": name})
        sizes = model_sizes(config, quant, optim, num_dense=1, tables=tables)
        return sizes.training_bytes

    for name in ("sgd", "adagrad"):
        assert table_bytes("int8", name) <= 0.3 * table_bytes("fp32", name)
        assert table_bytes("int4", name) <= 0.18 * table_bytes("fp32", name)


@pytest.mark.parametrize(
    "settings",
    [
        {"storage": "int8"},
        {"storage": "int8", "bits": 8},
        {"storage": "int8", "bits": 4, "granularity": "row"},
        {"storage": "int8", "bits": 8, "granularity": "row", "table_bits": {"a": 4}},
        {"storage": "int4", "bits": 4, "granularity": "row", "ste": "clip"},
    ],
    ids=["defaults", "table-scales", "other-bits", "other-table-bits", "clip"],
)
def test_settings_that_contradict_codes_are_refused(settings):
    with pytest.raises(ValueError, match=r"storage=int. trains the packed rows themselves"):
        QuantConfig.model_validate(settings)


def test_rows_that_became_infinite_show_as_nan():
    model, optimizer = setup("int8", name="sgd")
    gradient = RowGradient(torch.tensor([2]), torch.full((1, 16), float("inf")))
    optimizer.rows.step(gradient, 1.0)
    assert values_of(model)[2].isnan().all()
    assert values_of(model)[:2].isfinite().all()
