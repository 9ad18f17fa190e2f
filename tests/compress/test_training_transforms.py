"""Transforms over whole trainings: exact resume, ADMM's closed form, masks, schedules."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM, project
from dqrm.compress.grids.record import weight_record
from dqrm.compress.schedules import MoqBits
from dqrm.compress.transforms.activations import QuantizeActivations
from dqrm.compress.transforms.admm import Admm
from dqrm.compress.transforms.base import Compression
from dqrm.compress.transforms.latent import latent_weight
from dqrm.compress.transforms.layers import LayerReduction
from dqrm.compress.transforms.sparsify import OneShot, SrSte
from dqrm.compress.transforms.weights import QuantizeWeights

STEPS = 40
LR = 0.01
TWO_OF_FOUR = NM(2, 4)


class Tiny(nn.Module):
    """An embedding and three layers in a list."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 10)
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.head = nn.Linear(10, 3)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Training:
    """A model, its compression and its optimizer, on data of the step alone."""

    def __init__(self, transforms, steps=STEPS):
        torch.manual_seed(0)
        self.model = Tiny()
        self.compression = Compression(transforms)
        self.compression.attach(self.model, steps)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def run(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 11, (16,), generator=generator)
            torch.manual_seed(step)
            self.compression.before_forward(step)
            loss = functional.cross_entropy(self.model(ids), ids % 3)
            self.optimizer.zero_grad()
            loss.backward()
            self.compression.after_backward()
            self.optimizer.step()
            self.compression.after_step(step, LR, self.optimizer)
        return self

    def outputs(self):
        self.model.eval()
        with torch.no_grad():
            out = self.model(torch.arange(11))
        self.model.train()
        return out

    def weight(self, name="layers.0"):
        return latent_weight(self.model.get_submodule(name)).detach()


LAYERS = [r"layers\.\d"]
MOQ = MoqBits(8, 4, 3, offset=2, mix_ratio=0.3)
CASES = {
    "one-shot": lambda: [OneShot(LAYERS, TWO_OF_FOUR)],
    "sr-ste": lambda: [SrSte(LAYERS, TWO_OF_FOUR, decay=0.01)],
    "admm": lambda: [Admm(LAYERS, TWO_OF_FOUR, 20.0, updates=7)],
    "admm-grad": lambda: [Admm(LAYERS, TWO_OF_FOUR, 0.1, coupling="grad", ramp="geometric")],
    "moq": lambda: [QuantizeWeights([*LAYERS, "table"], 4, schedule=MOQ)],
    "stochastic": lambda: [QuantizeWeights([*LAYERS, "table"], 4, rounding="stochastic")],
    "everything": lambda: [
        LayerReduction("layers", [2, 0]),
        Admm(LAYERS, TWO_OF_FOUR, 20.0, updates=7, joint=True),
        QuantizeWeights(LAYERS, 4, Granularity("k_groups", 8), schedule=MOQ),
        QuantizeActivations(LAYERS),
    ],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("broken_at", [1, 9, 31])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(case, broken_at):
    whole = Training(CASES[case]()).run(0, STEPS)
    first = Training(CASES[case]()).run(0, broken_at)
    second = Training(CASES[case]())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    state = {key: value.clone() for key, value in first.compression.state_dict().items()}
    second.compression.load_state_dict(state)
    second.run(broken_at, STEPS)
    for wanted, found in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(wanted, found)
    assert whole.compression.metrics() == second.compression.metrics()
    assert whole.compression.finished()
    before = whole.outputs()
    whole.compression.freeze()
    second.compression.freeze()
    assert torch.equal(whole.outputs(), before)
    assert torch.equal(second.outputs(), before)
    assert set(whole.model.state_dict()) <= set(Tiny().state_dict())


def test_admm_converges_to_the_projection_when_nothing_else_pulls():
    # min |W - A|^2 / 2 over the pattern is project(A).
    torch.manual_seed(0)
    target = torch.randn(6, 20)
    model = nn.Sequential(nn.Linear(20, 6, bias=False))
    steps, lr = 1000, 0.3
    admm = Admm(["0"], TWO_OF_FOUR, 2.0, updates=200, polish=0.05, ramp="constant")
    with torch.no_grad():
        model[0].weight.copy_(target)
    admm.attach(model, steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    residuals = []
    for step in range(steps):
        admm.before_forward(step)
        (0.5 * (model[0].weight - target).square().sum()).backward()
        admm.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        admm.after_step(step, lr)
        residuals.append(admm.metrics()["admm/primal_residual"])
    assert residuals[900] < 1e-4 < max(residuals)
    admm.freeze()
    torch.testing.assert_close(model[0].weight.detach(), project(target, TWO_OF_FOUR))


def test_without_a_pull_admm_is_dense_training_until_the_cut():
    dense = Training([]).run(0, 28)
    admm = Training([Admm(LAYERS, TWO_OF_FOUR, 0.0, updates=4)]).run(0, 28)
    assert torch.equal(admm.weight(), dense.weight())
    assert not admm.compression.finished()
    with pytest.raises(RuntimeError, match="2:4 masks are searched for 28 steps"):
        admm.compression.freeze()
    admm.run(28, 29)
    assert not torch.equal(admm.weight(), dense.run(28, 29).weight())


def test_the_primal_residual_falls():
    training = Training([Admm(LAYERS, TWO_OF_FOUR, 30.0, updates=10)], steps=400)
    residuals = []
    for step in range(0, 280, 28):
        training.run(step, step + 28)
        residuals.append(training.compression.metrics()["admm/primal_residual"])
    assert residuals[-1] < residuals[0] / 3
    training.run(280, 281)
    assert training.compression.metrics()["admm/cut"] < 0.1


@pytest.mark.parametrize("case", ["one-shot", "sr-ste", "admm", "everything"])
def test_every_group_keeps_exactly_two_and_the_optimizer_forgets_the_rest(case):
    training = Training(CASES[case]()).run(0, STEPS)
    name = "layers.0"
    zero = training.weight(name) == 0
    # 10 inputs: two full groups and one of two, which keeps both.
    assert (~zero).sum(dim=1).tolist() == [6] * 10
    state = training.optimizer.state[latent_weight(training.model.get_submodule(name))]
    assert not state["exp_avg"][zero].any()
    assert not state["exp_avg_sq"][zero].any()
    assert state["exp_avg"][~zero].all()


def test_sr_ste_adds_its_pull_to_the_straight_through_gradient():
    training = Training([SrSte(["layers.0"], TWO_OF_FOUR, decay=0.5)])
    model = training.model
    training.compression.before_forward(0)
    weight = training.weight()
    sparse = project(weight, TWO_OF_FOUR)
    ids = torch.arange(11)
    model(ids).square().sum().backward()
    training.compression.after_backward()
    found = latent_weight(model.layers[0]).grad.clone()
    plain = Tiny()
    plain.load_state_dict(Training([]).model.state_dict())
    with torch.no_grad():
        plain.layers[0].weight.copy_(sparse)
    plain(ids).square().sum().backward()
    torch.testing.assert_close(found, plain.layers[0].weight.grad + 0.5 * (weight - sparse))


def test_moq_lowers_the_bits_of_sensitive_weights_later():
    transform = QuantizeWeights(LAYERS, 4, schedule=MoqBits(6, 4, 5), sensitivity=True)
    training = Training([transform])
    with pytest.raises(RuntimeError, match="call set_sensitivity"):
        training.run(0, 1)
    names = [f"layers.{n}" for n in range(3)]
    with pytest.raises(ValueError, match=r"no sensitivity of layers\.1, layers\.2"):
        transform.set_sensitivity({"layers.0": 1.0})
    with pytest.raises(ValueError, match=r"layers\.2: with factor 5 .* in step 50"):
        transform.set_sensitivity(dict(zip(names, [0.1, 0.5, 1.0], strict=True)))
    transform.set_sensitivity(dict(zip(names, [0.1, 0.5, 0.7], strict=True)))
    bits = []
    for step in range(STEPS):
        training.run(step, step + 1)
        bits.append(training.compression.metrics()["bits/mean"])
    assert bits[:5] == [6] * 5
    assert bits[5:10] == [5] * 5
    assert bits[10:30] == [pytest.approx(14 / 3)] * 20
    assert bits[30:] == [4] * 10


def test_what_was_not_measured_follows_the_plain_schedule():
    transform = QuantizeWeights(LAYERS, 4, schedule=MoqBits(6, 4, 5), sensitivity=True)
    training = Training([transform])
    transform.set_sensitivity({"layers.0": None, "layers.1": None, "layers.2": 0.1})
    training.run(0, 11)
    assert training.compression.metrics()["bits/mean"] == 4, "bits go down in the steps 5 and 10"


def test_metrics_of_one_name_are_means_over_weights():
    first = QuantizeWeights(("layers.0",), 4)
    others = QuantizeWeights(("layers.1", "layers.2"), 8)
    training = Training([first, others])
    sizes = [layer.weight.numel() for layer in training.model.layers]
    mean = (4 * sizes[0] + 8 * sum(sizes[1:])) / sum(sizes)
    assert training.compression.metrics()["bits/mean"] == pytest.approx(mean)


def test_a_mixed_end_is_finished_with_more_bits():
    schedule = MoqBits(6, 4, 5)
    transform = QuantizeWeights(LAYERS, 4, schedule=schedule, sensitivity=True, mixed_end=True)
    training = Training([transform])
    transform.set_sensitivity({"layers.0": 0.1, "layers.1": 1.0, "layers.2": 1.0})
    training.run(0, 10)
    assert not transform.finished()
    training.run(10, STEPS)
    assert transform.finished()
    transform.freeze()
    assert [weight_record(layer).bits for layer in training.model.layers] == [4, 5, 5]


def test_a_sensitive_weight_leaves_fp32_by_the_last_step():
    # Bits go down in the steps 5 and 30 (factor 3); ten steps more, and nothing is FP32.
    values = {"layers.0": 0.1, "layers.1": 0.1, "layers.2": 0.5}
    schedule = MoqBits(6, 4, 5, mix_ratio=0.1)
    strict = QuantizeWeights(LAYERS, 4, schedule=schedule, sensitivity=True)
    Training([strict], steps=39)
    with pytest.raises(ValueError, match=r"layers\.2: .* settle at 4 in step 39"):
        strict.set_sensitivity(values)
    for steps, last in ((39, 5), (40, 4)):
        mixed = QuantizeWeights(LAYERS, 4, schedule=schedule, sensitivity=True, mixed_end=True)
        training = Training([mixed], steps)
        mixed.set_sensitivity(values)
        training.run(0, steps)
        assert mixed.finished()
        mixed.freeze()
        assert [weight_record(layer).bits for layer in training.model.layers] == [4, 4, last]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_stochastic_rounding_is_for_gradients_in_either_mode(mode):
    model = Training([QuantizeWeights(LAYERS, 4, rounding="stochastic")]).model.train(mode)
    nearest = Training([QuantizeWeights(LAYERS, 4)]).model.layers[0].weight
    assert not torch.equal(model.layers[0].weight, model.layers[0].weight)
    assert not torch.equal(model.layers[0].weight, nearest)
    with torch.no_grad():
        assert torch.equal(model.layers[0].weight, nearest)


def test_before_the_offset_nothing_is_quantized():
    plain = Training([]).run(0, 2)
    quantized = Training(CASES["moq"]()).run(0, 2)
    assert torch.equal(plain.outputs(), quantized.outputs())
    with pytest.raises(RuntimeError, match="part FP32"):
        quantized.compression.freeze()
    assert not torch.equal(plain.run(2, 3).outputs(), quantized.run(2, 3).outputs())


def test_pattern_and_grid_in_either_order_are_the_same_for_symmetric_grids():
    training = Training([OneShot(LAYERS, TWO_OF_FOUR), QuantizeWeights(LAYERS, 4)])
    layer = training.model.layers[0]
    weight = training.weight()
    other = Training([QuantizeWeights(LAYERS, 4)]).model.layers[0]
    assert torch.equal(layer.weight, torch.where(weight != 0, other.weight, 0.0))


@pytest.mark.parametrize("bits", [1, 2], ids=["binary", "ternary"])
def test_scales_of_sparse_weights_are_those_of_the_kept(bits):
    training = Training([OneShot(LAYERS, TWO_OF_FOUR), QuantizeWeights(LAYERS, bits)])
    training.compression.freeze()
    layer = training.model.layers[1]
    torch.manual_seed(0)
    row = project(Tiny().layers[1].weight.detach(), TWO_OF_FOUR)[3]
    kept = row[row != 0].abs()
    scale = weight_record(layer).scale[3].item()
    large = kept[kept > 0.7 * kept.mean()] if bits == 2 else kept
    assert scale == pytest.approx(large.mean().item(), rel=1e-6)
    assert weight_record(layer).mask == TWO_OF_FOUR
    if bits == 1:
        assert (layer.weight[3] != 0).sum() == 6


@pytest.mark.parametrize("case", CASES)
def test_attaching_to_a_model_without_values_finds_what_is_wrong(case):
    with torch.device("meta"):
        model = Tiny()
    Compression(CASES[case]()).attach(model, STEPS)
    with pytest.raises(ValueError, match=r"dual updates|until step|two transforms|from 0 to 1"):
        Compression(CASES[case]()).attach(model, 8)


def test_layer_reduction_keeps_the_named_layers():
    model = Tiny()
    model.size = 3
    weights = [layer.weight for layer in model.layers]
    LayerReduction("layers", [2, 0], count="size").attach(model, 1)
    assert [layer.weight for layer in model.layers] == [weights[2], weights[0]]
    assert model.size == 2
    for path, layers, message in [
        ("head", [0], "there are: layers"),
        ("nowhere", [0], "there are: layers"),
        ("layers", [0, 2], "from 0 to 1"),
        ("layers", [0, 0], "different numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerReduction(path, layers).attach(model, 1)
    model.size = 5
    with pytest.raises(ValueError, match="size is 5, but layers has 2"):
        LayerReduction("layers", [0], count="size").attach(model, 1)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda: Admm(LAYERS, TWO_OF_FOUR, 1.0, updates=29), "29 dual updates in 28 steps"),
        (lambda: Admm(LAYERS, TWO_OF_FOUR, -1.0), "rho=-1"),
        (lambda: SrSte(LAYERS, TWO_OF_FOUR, polish=0.0), "polish=0"),
        (lambda: QuantizeWeights(LAYERS, 4, schedule=MoqBits(8, 4, 5)), "until step 40"),
        (lambda: QuantizeWeights(LAYERS, 4, schedule=MoqBits(8, 5, 5)), "leads to 5 bits"),
        (lambda: QuantizeWeights(LAYERS, 4, sensitivity=True), "there is none"),
        (lambda: LayerReduction("layers", []), "at least one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        Training([transform()])


def test_joint_needs_a_grid():
    with pytest.raises(ValueError, match=r"layers\.0: joint needs a weight grid"):
        Training([Admm(LAYERS, TWO_OF_FOUR, 1.0, joint=True)]).run(0, 1)


def test_a_state_of_another_model_is_refused():
    state = Training(CASES["admm"]()).compression.state_dict()
    for case in ("moq", "one-shot", "everything"):
        with pytest.raises(ValueError, match="state"):
            Training(CASES[case]()).compression.load_state_dict(state)


def test_masks_of_some_modules_alone_are_refused():
    for case in ("one-shot", "sr-ste"):
        state = Training(CASES["one-shot"]()).compression.state_dict()
        del state["0.layers.1.mask"]
        with pytest.raises(ValueError, match="masks of the state"):
            Training(CASES[case]()).compression.load_state_dict(state)
    with pytest.raises(ValueError, match="masks of the state"):
        Training(CASES["one-shot"]()).compression.load_state_dict({})


def test_a_weight_that_is_not_finite_cannot_be_frozen():
    training = Training([QuantizeWeights(LAYERS, 4)])
    with torch.no_grad():
        training.weight()[0, 0] = math.nan
    assert training.outputs().isnan().all()
    with pytest.raises(ValueError, match="not on the grid"):
        training.compression.freeze()
