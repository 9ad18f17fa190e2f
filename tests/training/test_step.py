"""The fused step and the one through autograd are the same step."""

import copy

import pytest
import torch
from torch import nn

from dqrm.compress.config import QuantConfig
from dqrm.data.batch import Batch
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.training.config import OptimConfig
from dqrm.training.optimizer import Optimizer
from dqrm.training.step import AutogradStep, FusedStep, TrainingError, linear_stack, make_step

TABLES = [("a", 50), ("b", 3), ("c", 700)]


def setup(model: dict | None = None, quant: dict | None = None, **optim):
    torch.manual_seed(0)
    shape = {"embedding_dim": 8, "bottom_mlp": (24, 16), "top_mlp": (32,), **(model or {})}
    dlrm = build_dlrm(
        ModelConfig(**shape), QuantConfig(**(quant or {})), num_dense=5, tables=TABLES
    )
    dlrm.train()
    return dlrm, Optimizer(dlrm, OptimConfig(**{"lr": 0.05, **optim}))


def batch(seed: int, size: int = 37, *, multi_hot: bool = False) -> Batch:
    random = torch.Generator().manual_seed(seed)
    lengths = (
        torch.randint(0, 4, (len(TABLES), size), generator=random)
        if multi_hot
        else torch.ones(len(TABLES), size, dtype=torch.int64)
    )
    indices = [
        torch.randint(0, rows, (int(n.sum()),), generator=random, dtype=torch.int32)
        for (_, rows), n in zip(TABLES, lengths, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return Batch(
        torch.rand(size, 5, generator=random),
        torch.cat(indices),
        offsets if multi_hot else None,
        torch.randint(0, 2, (size,), generator=random).float(),
    )


def train_both(steps: int = 4, multi_hot: bool = False, precision: str = "fp32", **settings):
    """Losses of both steps over the same batches, and the models they leave."""
    first, second = setup(**settings), setup(**settings)
    autograd = AutogradStep(*first, bf16=precision == "bf16")
    fused = FusedStep(*second, precision)
    losses = []
    for step in range(steps):
        # The last batch of an epoch is smaller.
        data = batch(step, 37 if step % 3 != 2 else 5, multi_hot=multi_hot)
        losses.append((autograd(data, step), fused(data, step)))
    return losses, first[0], second[0]


SETTINGS = {
    "sgd": {},
    "adagrad": {"name": "adagrad"},
    "adam": {"name": "adam", "lr": 0.005},
    "fp32": {"quant": {"bits": 32, "mlp_bits": 32}},
    "rows": {"quant": {"granularity": "row"}},
    "period": {"quant": {"scale_period": 2}},
    "clip mask": {"quant": {"ste": "clip", "scale_period": 50}, "lr": 0.5},
    "clip norm": {"clip_norm": 0.05, "weight_decay": 0.1, "embedding_weight_decay": 0.1},
    "itself": {"model": {"interaction_itself": True}},
    "multi-hot": {"multi_hot": True, "model": {"pooling": "mean"}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_steps_agree(settings):
    losses, first, second = train_both(**settings)
    for expected, got in losses:
        assert got == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        dict(second.state_dict()), dict(first.state_dict()), rtol=1e-4, atol=2e-6
    )


def test_the_fused_step_learns_in_bfloat16():
    losses, _, _ = train_both(precision="bf16", steps=6)
    for expected, got in losses:
        assert got == pytest.approx(expected, rel=0.02)


def test_the_fused_step_learns_in_int8():
    losses, _, _ = train_both(precision="int8", steps=6, model={"bottom_mlp": (40, 32)})
    for expected, got in losses:
        assert got == pytest.approx(expected, rel=0.02)


def test_the_seed_and_the_step_decide_the_random_bits_of_int8():
    def updated(seed: int, number: int) -> torch.Tensor:
        model, optimizer = setup(model={"bottom_mlp": (40, 32)})
        FusedStep(model, optimizer, "int8", seed)(batch(0), number)
        return model.bot_l[2].weight.detach().clone()

    assert torch.equal(updated(3, 7), updated(3, 7))
    assert not torch.equal(updated(3, 7), updated(3, 8))
    assert not torch.equal(updated(3, 7), updated(4, 7))


def test_any_number_of_threads_gives_the_same_bits():
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model, optimizer = setup(name="adagrad")
            step = FusedStep(model, optimizer)
            for number in range(3):
                step(batch(number, 300), number)
            states.append(copy.deepcopy(model.state_dict()))
    finally:
        torch.set_num_threads(threads)
    for other in states[1:]:
        for name, tensor in states[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_loss_that_is_not_finite_updates_nothing(precision):
    model, optimizer = setup(model={"bottom_mlp": (40, 32)})
    before = copy.deepcopy(model.state_dict())
    data = batch(0)
    data.dense[3, 1] = float("nan")
    with pytest.raises(TrainingError, match="the loss became nan at step 8; lower"):
        FusedStep(model, optimizer, precision)(data, 7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_models_that_cannot_be_fused_go_through_autograd():
    for shape in ({"dropout": 0.5}, {"interaction": "cat"}):
        step = make_step(*setup(model=shape))
        assert isinstance(step, AutogradStep)
        assert step(batch(0), 0) > 0
        with pytest.raises(TypeError, match="int8 computes only linear layers, ReLU and the dot"):
            make_step(*setup(model=shape), "int8")
    assert isinstance(make_step(*setup()), FusedStep)


def test_only_linear_layers_and_relu_make_a_stack():
    linear = nn.Linear(3, 3)
    layers = linear_stack(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 2)))
    assert layers is not None
    assert [layer.relu for layer in layers] == [True, False]
    assert layers[0].weight is linear.weight
    assert linear_stack(nn.Sequential(linear, nn.Tanh())) is None
    assert linear_stack(nn.Sequential(nn.ReLU(), linear)) is None
