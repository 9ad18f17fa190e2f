"""Row optimizers against torch's own, the schedule, clipping and restored state."""

import pytest
import torch

from dqrm.compress.config import QuantConfig
from dqrm.kernels.tables import RowGradient
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.training.config import OptimConfig
from dqrm.training.optimizer import Optimizer, rate_factor

NETWORK = {"embedding_dim": 4, "bottom_mlp": [5], "top_mlp": [6]}


def setup(**settings):
    torch.manual_seed(0)
    model = build_dlrm(
        ModelConfig.model_validate(NETWORK),
        QuantConfig(),
        num_dense=2,
        tables=[("a", 6), ("b", 30)],
    )
    return model, Optimizer(model, OptimConfig.model_validate(settings))


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 6, (2 * 8,), generator=generator)
    model(torch.rand(8, 2, generator=generator), indices).square().sum().backward()


def test_row_sgd_equals_torch():
    model, optimizer = setup(name="sgd", lr=0.3)
    twin = model.emb_l.weight.detach().clone().requires_grad_()
    reference = torch.optim.SGD([twin], lr=0.3)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        twin.grad = model.emb_l.weight.grad.to_dense()
        reference.step()
        optimizer.step(step)
        torch.testing.assert_close(model.emb_l.weight, twin, rtol=1e-6, atol=1e-7)


def test_row_adam_equals_torch_sparse_adam():
    model, optimizer = setup(name="adam", lr=0.01)
    twin = model.emb_l.weight.detach().clone().requires_grad_()
    reference = torch.optim.SparseAdam([twin], lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        twin.grad = model.emb_l.weight.grad.coalesce()
        reference.step()
        optimizer.step(step)
        # eps enters torch's formula before the bias correction: eps * sqrt(1 - beta2**t).
        torch.testing.assert_close(model.emb_l.weight, twin, rtol=1e-4, atol=1e-6)


def test_row_adagrad_by_hand():
    model, optimizer = setup(name="adagrad", lr=0.5, eps=1e-12)
    weight = model.emb_l.weight.detach().clone()
    gradient = RowGradient(torch.tensor([2, 9]), torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0] * 4]))
    optimizer.rows.step(gradient, 0.5)
    # Mean square 25 / 4, root 2.5: the first step is 0.5 * g / 2.5.
    torch.testing.assert_close(
        model.emb_l.weight[2], weight[2] - torch.tensor([0.6, 0.8, 0.0, 0.0])
    )
    assert torch.equal(model.emb_l.weight[9], weight[9])
    optimizer.rows.step(RowGradient(gradient.rows[:1], gradient.values[:1]), 0.5)
    assert optimizer.rows.state()["sum"][2].item() == 12.5


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_only_touched_rows_change_and_scales_stay_exact(name):
    model, optimizer = setup(name=name, embedding_weight_decay=0.1)
    before = model.emb_l.weight.detach().clone()
    optimizer.rows.step(RowGradient(torch.tensor([1, 7]), torch.ones(2, 4)), 5.0)
    changed = (model.emb_l.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [1, 7]
    expected = torch.stack([rows.abs().max() for rows in model.emb_l.table_rows()]) / 7
    assert torch.equal(model.emb_l.table_scale, expected)


def test_embedding_weight_decay_by_hand():
    model, optimizer = setup(name="sgd", embedding_weight_decay=0.5)
    with torch.no_grad():
        model.emb_l.weight[3] = 2.0
    optimizer.rows.step(RowGradient(torch.tensor([3]), torch.zeros(1, 4)), 0.1)
    assert model.emb_l.weight[3].tolist() == pytest.approx([1.9] * 4)


def test_dense_weight_decay_spares_biases():
    model, optimizer = setup(name="sgd", lr=0.1, weight_decay=0.5)
    weight, bias = model.top_l[0].weight.detach().clone(), model.top_l[0].bias.detach().clone()
    optimizer.zero_grad()
    optimizer.step(0)
    torch.testing.assert_close(model.top_l[0].weight, weight * 0.95)
    assert torch.equal(model.top_l[0].bias, bias)


def test_schedule_by_hand():
    config = OptimConfig(warmup_steps=4, decay_start_step=10, decay_steps=10)
    factors = [rate_factor(step, config) for step in (0, 3, 4, 9, 10, 15, 20, 99)]
    assert factors == [0.25, 1, 1, 1, 1, 0.25, 0, 0]


def test_clipping_bounds_the_norm_of_dense_and_rows_together():
    model, optimizer = setup(name="sgd", lr=1.0, clip_norm=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step(0)
    moved = sum((a - b).square().sum() for a, b in zip(before, model.parameters(), strict=True))
    assert moved.sqrt().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_restored_state_continues_bit_for_bit(name):
    model, optimizer = setup(name=name, lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(step)
    twin, twin_optimizer = setup(name=name, lr=0.05)
    twin.load_state_dict(model.state_dict())
    twin.emb_l.restore_scales()
    twin_optimizer.load_state({k: v.clone() for k, v in optimizer.state().items()})
    for step in range(3, 6):
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            backward(m, step)
            o.step(step)
    for (key, a), (_, b) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_state_of_another_optimizer_is_refused():
    _, sgd = setup(name="sgd")
    _, adam = setup(name="adam")
    with pytest.raises(ValueError, match=r"no state 'rows.first' of optim.name=adam"):
        adam.load_state(sgd.state())
