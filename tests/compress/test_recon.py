"""Layer-wise reconstruction: capture, least squares, distillation, GPTQ of layers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import (
    WeightRecord,
    codes,
    dequantize,
    set_weight_record,
    weight_record,
)
from dqrm.compress.grids.records_file import save_records
from dqrm.compress.recon.capture import (
    LayerStream,
    TensorShelf,
    called_linears,
    input_gram,
    masked_mean_square,
)
from dqrm.compress.recon.layerwise import Calibration, GptqRecipe, LayerwiseQuantizer
from dqrm.compress.recon.least_squares import UnitLeastSquares
from dqrm.compress.recon.lkd import LkdRecipe
from dqrm.compress.recon.targets import Target, quantize_without_data
from dqrm.compress.transforms.activations import (
    attach_activation_quantizer,
    fake_quantize_tokens,
    has_activation_quantizer,
)

WIDTH, TOKENS, BATCHES, ROWS = 16, 6, 5, 4


class Layer(nn.Module):
    """A layer as encoders call it: other arguments shared, hidden states first of a tuple."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden, mask, gain=1.0):
        mixed = hidden + (hidden * mask[..., None]).mean(1, keepdim=True) * gain
        return self.norm(hidden + self.down(torch.relu(self.up(mixed)))), None


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, mask):
        hidden = self.embed(x)
        for layer in self.layers:
            hidden, _ = layer(hidden, mask, gain=0.5)
        return self.head(hidden[:, 0])


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(BATCHES):
        mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
        mask[0, 3:] = False
        made.append((torch.randn(ROWS, TOKENS, 3, generator=generator), mask))
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Encoder().eval()


def forwards(batches):
    return lambda model: [lambda x=x, mask=mask: model(x, mask) for x, mask in batches]


def calibration(batches, folder, memory=1 << 20):
    return Calibration(forwards(batches), [mask for _, mask in batches], folder, memory)


def test_a_shelf_keeps_what_fits_and_files_the_rest(tmp_path):
    shelf = TensorShelf(tmp_path / "shelf", 100)
    values = [torch.full((n,), float(n)) for n in (10, 20, 5, 30)]
    for value in values:
        shelf.append(value)
    # 40 bytes and 20 fit.
    assert sorted(path.name for path in (tmp_path / "shelf").iterdir()) == [
        "1.safetensors",
        "3.safetensors",
    ]
    for index, value in enumerate(values):
        assert torch.equal(shelf[index], value)
        shelf.replace(index, -value)
        assert torch.equal(shelf[index], -value)


@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["files", "memory"])
def test_a_stream_has_what_every_layer_takes(model, batches, tmp_path, memory):
    seen = {n: [] for n in range(3)}
    for n, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0]))
    with torch.no_grad():
        for forward in forwards(batches)(model):
            forward()
    expected = {n: list(values) for n, values in seen.items()}
    stream = LayerStream(list(model.layers), forwards(batches)(model), tmp_path / "s", memory)
    for n in range(3):
        assert stream.position == n
        assert all(torch.equal(stream.hidden(b), expected[n][b]) for b in range(BATCHES))
        stream.advance()
    assert (tmp_path / "s").exists() == (memory == 0)
    with pytest.raises(ValueError, match="never called"):
        LayerStream([nn.Linear(1, 1)], forwards(batches)(model), tmp_path, 0)


def test_padding_is_left_out(model, batches, tmp_path):
    stream = LayerStream(list(model.layers), forwards(batches)(model), tmp_path, 1 << 20)
    layer, valid = model.layers[0], [mask for _, mask in batches]
    assert called_linears(layer, stream) == ["up", "down"]
    taken = []
    layer.down.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    gram = input_gram(layer, layer.down, stream, valid)
    rows = torch.cat([x[mask] for x, mask in zip(taken, valid, strict=True)]).double()
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    error = torch.ones(1, 3, 2)
    error[0, 2] = 1000.0
    tokens = torch.tensor([[True, True, False]])
    assert float(masked_mean_square(error, tokens)) == 1.0


@pytest.mark.parametrize("size", [1, 4], ids=["neurons", "heads"])
@pytest.mark.parametrize("shift", [False, True], ids=["scales", "scales-and-bias"])
def test_normal_equations_equal_dense_least_squares(size, shift):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, generator=generator)
    inputs = torch.randn(50, 8, generator=generator) + 0.5
    lack = torch.randn(50, 6, generator=generator) + 0.3
    solver = UnitLeastSquares(weight, size)
    solver.add(inputs[:20], lack[:20])
    solver.add(inputs[20:], lack[20:])
    units = torch.ones(8 // size, dtype=torch.bool)
    units[1] = False
    scales, bias = solver.solve(units, 0.0, shift=shift)
    # One column a unit that may change (and one an output, for the bias).
    parts = [
        (inputs[:, u * size : (u + 1) * size] @ weight[:, u * size : (u + 1) * size].T).reshape(-1)
        for u in units.nonzero()[:, 0].tolist()
    ]
    if shift:
        parts += list(torch.eye(6).repeat(50, 1, 1).reshape(-1, 6).T)
    dense = torch.linalg.lstsq(torch.stack(parts, 1).double(), lack.reshape(-1, 1).double())
    solution = dense.solution[:, 0].float()
    count = int(units.sum())
    torch.testing.assert_close(scales[units], 1 + solution[:count], rtol=1e-4, atol=1e-4)
    assert scales[1] == 1.0
    expected = solution[count:] if shift else torch.zeros(6)
    torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-4)
    damped, _ = solver.solve(units, 1e6, shift=shift)
    torch.testing.assert_close(damped, torch.ones(len(units)), rtol=0, atol=1e-4)


def test_nothing_lacking_needs_no_change():
    solver = UnitLeastSquares(torch.randn(6, 8), 2)
    solver.add(torch.randn(30, 8), torch.zeros(30, 6))
    scales, bias = solver.solve(torch.ones(4, dtype=torch.bool), 0.1, shift=True)
    assert torch.equal(scales, torch.ones(4))
    assert not bias.any()


TARGETS = {
    "embed": Target(8),
    **{f"layers.{n}.{name}": Target(3, activation_bits=8) for n in range(3) for name in ("up",)},
    **{f"layers.{n}.down": Target(4, Granularity("k_groups", 8)) for n in range(3)},
}


def quantizer(model, teacher, batches, folder, recipe, inputs, first=0):
    layers = [f"layers.{n}" for n in range(3)]
    return LayerwiseQuantizer(
        model, teacher, layers, TARGETS, recipe, inputs, calibration(batches, folder), first
    )


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize(
    "recipe", [LkdRecipe(60, 3e-3, 0), GptqRecipe(0.01, True)], ids=["lkd", "gptq"]
)
def test_layers_get_nearer_to_the_original_and_leave_records(
    model, batches, tmp_path, recipe, inputs
):
    teacher = copy.deepcopy(model)
    run = quantizer(model, teacher, batches, tmp_path, recipe, inputs)
    for _ in range(3):
        loss = run.step()
        # Inputs of the teacher are fitted layer by layer, so every layer must have gained.
        assert 0 < loss.end < loss.start
    for name, target in TARGETS.items():
        module = model.get_submodule(name)
        record = weight_record(module)
        assert (record.bits, record.activation_bits) == (target.bits, target.activation_bits)
        assert torch.equal(module.weight, dequantize(codes(module.weight, record), record))
        assert isinstance(module.weight, nn.Parameter)
    assert weight_record(model.head) is None
    for before, after in zip(teacher.head.parameters(), model.head.parameters(), strict=True):
        assert torch.equal(before, after)
    torch.manual_seed(0)
    untouched = Encoder()
    for left, right in zip(teacher.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(left, right)


def cut_to_patterns(model):
    """Every up of the layers on 2:4, one with its input on a grid; return its masks."""
    masks = {}
    for n, layer in enumerate(model.layers):
        masks[n] = NM(2, 4).mask(layer.up.weight)
        with torch.no_grad():
            layer.up.weight *= masks[n]
        record = WeightRecord("fp32", 32, Granularity("tensor"), torch.empty(0), NM(2, 4))
        set_weight_record(layer.up, record)
    attach_activation_quantizer(model.layers[0].down, 8, "asymmetric")
    record = replace(record, mask=None, activation_bits=8, activation_grid="asymmetric")
    set_weight_record(model.layers[0].down, record)
    return masks


@pytest.mark.parametrize(
    "recipe",
    [None, LkdRecipe(20, 3e-3, 0), GptqRecipe(0.01, False)],
    ids=["rounded", "lkd", "gptq"],
)
def test_what_was_done_to_weights_and_inputs_before_stays(model, batches, tmp_path, recipe):
    masks = cut_to_patterns(model)
    if recipe is None:
        for name, target in TARGETS.items():
            quantize_without_data(model, name, target)
    else:
        run = quantizer(model, copy.deepcopy(model), batches, tmp_path, recipe, "student")
        for _ in range(3):
            run.step()
    for n, layer in enumerate(model.layers):
        record = weight_record(layer.up)
        assert (record.grid, record.bits, record.mask) == ("symmetric", 3, NM(2, 4))
        assert (record.activation_bits, record.activation_grid) == (8, "symmetric")
        assert torch.equal(layer.up.weight, dequantize(codes(layer.up.weight, record), record))
        assert not layer.up.weight[~masks[n]].any()
        record = weight_record(layer.down)
        assert (record.bits, record.mask) == (4, None)
        assert record.activation_grid == ("asymmetric" if n == 0 else "symmetric")
        assert record.activation_bits == (8 if n == 0 else 32)
        assert has_activation_quantizer(layer.down) == (n == 0)


@pytest.mark.parametrize(
    "targets",
    [
        {"layers.0.down": Target(3)},
        {"layers.0.down": Target(3), "layers.0.up": Target(32, activation_bits=8)},
    ],
    ids=["unnamed", "inputs alone"],
)
def test_distillation_keeps_patterns_of_weights_that_get_no_grid(model, batches, tmp_path, targets):
    masks = cut_to_patterns(model)
    before = model.layers[0].up.weight.detach().clone()
    run = LayerwiseQuantizer(
        model,
        copy.deepcopy(model),
        ["layers.0"],
        targets,
        LkdRecipe(60, 1e-3, 0),
        "teacher",
        calibration(batches, tmp_path),
    )
    loss = run.step()
    assert loss.end < loss.start
    up = model.layers[0].up
    assert not torch.equal(up.weight, before), "it learns with the layer"
    assert torch.equal(up.weight != 0, masks[0])
    record = weight_record(up)
    assert (record.grid, record.mask) == ("fp32", NM(2, 4))
    assert record.activation_bits == (8 if "layers.0.up" in targets else 32)
    save_records(tmp_path, model)


def test_a_record_that_is_no_longer_true_is_not_saved(model, tmp_path):
    cut_to_patterns(model)
    with torch.no_grad():
        model.layers[1].up.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"layers\.1\.up: a group has more weights than 2:4"):
        save_records(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_binary_weights_of_a_pattern_have_zeros(model):
    masks = cut_to_patterns(model)
    quantize_without_data(model, "layers.0.up", Target(1))
    weight = model.layers[0].up.weight
    assert torch.equal(weight != 0, masks[0])
    with pytest.raises(ValueError, match=r"layers\.0\.up: its weight was compressed before"):
        quantize_without_data(model, "layers.0.up", Target(8))


def test_a_target_puts_inputs_on_its_grid_in_place_of_another(model):
    cut_to_patterns(model)
    quantize_without_data(model, "layers.0.down", Target(8, activation_bits=8))
    layer = model.layers[0].down
    x = torch.rand(5, 24, generator=torch.Generator().manual_seed(6))
    expected = nn.functional.linear(fake_quantize_tokens(x), layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)


def test_a_layer_that_training_makes_worse_stays_as_it_was(model, batches, tmp_path):
    teacher = copy.deepcopy(model)
    run = quantizer(model, teacher, batches, tmp_path, LkdRecipe(3, 100.0, 0), "teacher")
    loss = run.step()
    assert loss.end == loss.start
    for name in ("norm.weight", "up.bias"):
        assert torch.equal(
            model.layers[0].get_parameter(name), teacher.layers[0].get_parameter(name)
        )


def test_going_on_behind_a_finished_layer(model, batches, tmp_path):
    teacher = copy.deepcopy(model)
    recipe = LkdRecipe(10, 1e-3, 0)
    whole = copy.deepcopy(model)
    run = quantizer(whole, teacher, batches, tmp_path / "a", recipe, "student")
    for _ in range(3):
        run.step()
    run = quantizer(model, teacher, batches, tmp_path / "b", recipe, "student")
    run.step()
    run = quantizer(model, teacher, batches, tmp_path / "c", recipe, "student", first=1)
    assert run.position == 1
    run.step()
    run.step()
    for left, right in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gptq_of_other_grids_is_refused(model, batches, tmp_path):
    with pytest.raises(ValueError, match="up: GPTQ rounds to symmetric grids, not to ternary"):
        LayerwiseQuantizer(
            model,
            copy.deepcopy(model),
            ["layers.0"],
            {"layers.0.up": Target(2)},
            GptqRecipe(0.01, False),
            "teacher",
            calibration(batches, tmp_path),
        )
