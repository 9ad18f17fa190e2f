"""The fused step and the one through autograd are the same step."""

import copy

import pytest
import torch
from torch import nn

from dqrm.compress.config import QuantConfig
from dqrm.data.batch import Batch
from dqrm.kernels.dropout import dropout_reference
from dqrm.kernels.rounding import step_key
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.training.config import OptimConfig
from dqrm.training.errors import TrainingError
from dqrm.training.optimizer import Optimizer
from dqrm.training.step import AutogradStep, FusedStep, linear_stack, make_step

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
    "cat": {"model": {"interaction": "cat"}},
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


def test_dropout_drops_units_whose_bits_belong_to_the_seed_and_the_step():
    def loss(seed: int, number: int, precision: str = "fp32") -> float:
        model, optimizer = setup(model={"dropout": 0.5, "bottom_mlp": (40, 32)}, lr=1e-6)
        return FusedStep(model, optimizer, precision, seed)(batch(0), number)

    assert loss(1, 2) == loss(1, 2)
    assert len({loss(1, 2), loss(1, 3), loss(2, 2)}) == 3
    for precision in ("bf16", "int8"):
        assert loss(1, 2, precision) == pytest.approx(loss(1, 2), rel=0.03)


def test_dropout_is_autograds_with_the_same_units_dropped():
    class Keyed(nn.Dropout):
        key, stream = 0, 0

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return dropout_reference(values, self.p, self.key, self.stream)

    shape = {"dropout": 0.4, "top_mlp": (32, 24)}
    first, second = setup(model=shape), setup(model=shape)
    drops = [Keyed(0.4) for _ in range(2)]
    for number, drop in enumerate(drops):
        first[0].top_l[2 * number + 1][1] = drop
        drop.stream = (1 << 30) + number + 1
    autograd, fused = AutogradStep(*first), FusedStep(*second, seed=9)
    for number in range(4):
        Keyed.key = step_key(step_key(9, 2), number)
        data = batch(number)
        assert fused(data, number) == pytest.approx(autograd(data, number), rel=1e-5)
    torch.testing.assert_close(
        dict(second[0].state_dict()), dict(first[0].state_dict()), rtol=1e-4, atol=2e-6
    )


def test_other_modules_go_through_autograd():
    model, optimizer = setup()
    assert isinstance(make_step(model, optimizer), FusedStep)
    model.top_l[1] = nn.Tanh()
    step = make_step(model, optimizer)
    assert isinstance(step, AutogradStep)
    assert step(batch(0), 0) > 0
    with pytest.raises(TypeError, match="int8 is for linear layers, ReLU, dropout and the dot"):
        make_step(model, optimizer, "int8")


def test_only_linear_layers_relu_and_dropout_make_a_stack():
    linear = nn.Linear(3, 3)
    layers = linear_stack(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 2)))
    assert layers is not None
    assert [layer.relu for layer in layers] == [True, False]
    assert layers[0].weight is linear.weight
    assert linear_stack(nn.Sequential(linear, nn.Tanh())) is None
    assert linear_stack(nn.Sequential(nn.ReLU(), linear)) is None
    dropped = linear_stack(
        nn.Sequential(linear, nn.Sequential(nn.ReLU(), nn.Dropout(0.25)), nn.Linear(3, 2))
    )
    assert dropped is not None
    assert [layer.dropout for layer in dropped] == [0.25, 0.0]
    for last in (nn.Tanh(), nn.Dropout2d()):
        assert linear_stack(nn.Sequential(linear, nn.Sequential(nn.ReLU(), last))) is None
    assert linear_stack(nn.Sequential(linear, nn.ReLU(), nn.ReLU())) is None
