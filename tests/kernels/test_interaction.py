"""The dot interaction at every level against a float64 oracle, and as torch sees it."""

import shutil
import subprocess
import sys

import pytest
import torch

from dqrm.kernels.interaction import (
    dot_interaction,
    dot_interaction_backward_reference,
    dot_interaction_reference,
    interaction_backward,
    interaction_forward,
    interaction_width,
)

# Around the widths of registers and tiles (4, 8, 9, 16) and beyond two of them.
COUNTS = [1, 2, 3, 4, 5, 8, 9, 10, 16, 17, 18, 26, 27, 28, 33, 40]
DIMS = [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 32, 48, 64, 100, 128, 256]
BATCH = 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_sum(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """A float32 sum of n products is within n + 1 half ulps of the sum of their magnitudes."""
    assert got.isfinite().all()
    bound = magnitude * (terms + 1) * 2.0**-24 + 1e-45
    assert ((got.double() - exact).abs() <= bound).all()


def apart(batch: int, *shape: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of samples ``gap`` floats apart that starts off any alignment, and all its memory."""
    floats = torch.Size(shape).numel()
    memory = torch.full((1 + batch * (floats + gap),), 7.0)
    return memory[1:].view(batch, floats + gap)[:, :floats].unflatten(1, shape), memory


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_every_shape_is_as_close_to_float64_as_its_sums_allow(each_level, dim, itself):
    for count in COUNTS:
        width = interaction_width(count, dim, itself=itself)
        vectors, grad = random(BATCH, count, dim), random(BATCH, width, seed=1)
        exact = vectors.double()
        forward = dot_interaction_reference(exact, itself=itself)
        backward = dot_interaction_backward_reference(exact, grad.double(), itself=itself)
        forward_magnitude = dot_interaction_reference(exact.abs(), itself=itself)
        backward_magnitude = dot_interaction_backward_reference(
            exact.abs(), grad.double().abs(), itself=itself
        )
        for _ in each_level():
            out, grad_vectors = torch.full_like(forward, 7.0).float(), torch.full_like(vectors, 7.0)
            interaction_forward(vectors, out, itself)
            interaction_backward(vectors, grad, grad_vectors, itself)
            assert torch.equal(out[:, :dim], vectors[:, 0])
            assert_sum(out, forward, forward_magnitude, dim)
            assert_sum(grad_vectors, backward, backward_magnitude, count + 2)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(("count", "dim"), [(27, 16), (5, 3), (9, 40), (1, 4), (2, 1)])
def test_memory_between_and_beside_the_samples_is_left_alone(each_level, count, dim, itself):
    width = interaction_width(count, dim, itself=itself)
    values, slopes = random(4, count, dim), random(4, width, seed=1)
    vectors, _ = apart(4, count, dim, gap=2 * dim)
    grad, _ = apart(4, width, gap=5)
    vectors.copy_(values)
    grad.copy_(slopes)
    for _ in each_level():
        out, out_memory = apart(4, width, gap=3)
        grad_vectors, grad_memory = apart(4, count, dim, gap=dim)
        interaction_forward(vectors, out, itself)
        interaction_backward(vectors, grad, grad_vectors, itself)
        torch.testing.assert_close(out, dot_interaction_reference(values, itself=itself))
        torch.testing.assert_close(
            grad_vectors, dot_interaction_backward_reference(values, slopes, itself=itself)
        )
        out.fill_(7.0)
        grad_vectors.fill_(7.0)
        assert (out_memory == 7.0).all()
        assert (grad_memory == 7.0).all()


def test_results_do_not_depend_on_the_threads(each_level):
    vectors, grad = random(700, 27, 16), random(700, interaction_width(27, 16), seed=1)
    before = torch.get_num_threads()
    try:
        for level in each_level():
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out, grad_vectors = torch.empty(grad.shape), torch.empty_like(vectors)
                interaction_forward(vectors, out)
                interaction_backward(vectors, grad, grad_vectors)
                results.append((out, grad_vectors))
            for out, grad_vectors in results[1:]:
                assert torch.equal(out, results[0][0]), level
                assert torch.equal(grad_vectors, results[0][1]), level
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("itself", [False, True])
def test_nan_and_infinity_reach_what_they_are_factors_of_and_no_more(each_level, itself):
    vectors = random(2, 20, 24)
    vectors[1, 17, 23], vectors[1, 3, 0] = torch.nan, torch.inf
    clean = dot_interaction_reference(torch.randn(1, 20, 24), itself=itself).new_ones
    expected = dot_interaction_reference(vectors, itself=itself)
    grad = clean(expected.shape)
    grad[:, 24:] = 0.0
    first_pair = 24 + (1 if itself else 0)
    grad[1, first_pair] = torch.nan  # the product of the vectors 0 and 1
    for _ in each_level():
        out, grad_vectors = torch.empty_like(expected), torch.empty_like(vectors)
        interaction_forward(vectors, out, itself)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert out[0].isfinite().all()
        interaction_backward(vectors.nan_to_num(posinf=0.0), grad, grad_vectors, itself)
        assert grad_vectors[1, :2].isnan().all()
        assert not grad_vectors[1, 2:].isnan().any()
        assert not grad_vectors[0].isnan().any()


def test_denormal_and_huge_values_are_not_flushed_or_clamped(each_level):
    vectors = torch.tensor([[[1e-20, 0.0], [1e-20, 0.0], [1e-39, 1e19]]])
    expected = dot_interaction_reference(vectors.double())
    for _ in each_level():
        out = torch.empty(1, 5)
        interaction_forward(vectors, out)
        assert out[0, 2] != 0.0
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1.5e-45)


def test_no_samples_are_no_work(each_level):
    for _ in each_level():
        interaction_forward(torch.empty(0, 3, 4), torch.empty(0, 7))
        interaction_backward(torch.empty(0, 3, 4), torch.empty(0, 7), torch.empty(0, 3, 4))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("vectors", "out", "message"),
    [
        (zeros(2, 3, 4).double(), zeros(2, 7), "vectors: must be float32"),
        (zeros(2, 3, 4), zeros(2, 7).half(), "out: must be float32"),
        (zeros(2, 12), zeros(2, 7), r"vectors: must have 3 dimensions, has shape \[2, 12\]"),
        (zeros(2, 3, 4), zeros(2, 8), r"out: must be \[2, 7\], is \[2, 8\]"),
        (zeros(2, 3, 4), zeros(1, 7), r"out: must be \[2, 7\], is \[1, 7\]"),
        (zeros(2, 0, 4), zeros(2, 4), r"vectors: needs at least one vector .* is \[2, 0, 4\]"),
        (zeros(2, 4, 3).mT, zeros(2, 7), "vectors: a sample's values must be contiguous"),
        (zeros(2, 3, 4), zeros(7, 2).mT, "out: a sample's values must be contiguous"),
        (zeros(2, 3, 4), zeros(1, 7).expand(2, 7), "out: samples must not overlap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tensor_is_refused(each_level, vectors, out, message):
    for _ in each_level():
        with pytest.raises(ValueError, match=message):
            interaction_forward(vectors, out)


def test_a_gradient_of_another_shape_and_shared_memory_are_refused(each_level):
    vectors, grad = zeros(2, 3, 4), zeros(2, 7)
    memory = zeros(100)
    for _ in each_level():
        with pytest.raises(ValueError, match=r"grad_vectors: must be \[2, 3, 4\], is \[2, 4, 3\]"):
            interaction_backward(vectors, grad, zeros(2, 4, 3))
        with pytest.raises(ValueError, match=r"grad_out: must be \[2, 7\], is \[2, 10\]"):
            interaction_backward(vectors, zeros(2, 10), zeros(2, 3, 4))
        with pytest.raises(ValueError, match="must not share memory"):
            interaction_backward(vectors, grad, vectors)
        with pytest.raises(ValueError, match="must not share memory"):
            interaction_forward(memory[:24].view(2, 3, 4), memory[20:34].view(2, 7))


@pytest.mark.parametrize("itself", [False, True])
def test_plain_backward_is_the_derivative_of_the_plain_forward(itself):
    vectors = random(2, 5, 3).double().requires_grad_()
    out = dot_interaction_reference(vectors, itself=itself)
    grad_out = random(*out.shape, seed=1).double()
    (grad,) = torch.autograd.grad(out, vectors, grad_out)
    got = dot_interaction_backward_reference(vectors.detach(), grad_out, itself=itself)
    torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("itself", [False, True])
def test_torch_accepts_the_operator(itself):
    vectors = random(2, 5, 8).requires_grad_()
    torch.library.opcheck(torch.ops.dqrm.dot_interaction.default, (vectors, itself))
    grad = random(2, interaction_width(5, 8, itself=itself))
    torch.library.opcheck(
        torch.ops.dqrm.dot_interaction_backward.default, (vectors.detach(), grad, itself)
    )


@pytest.mark.parametrize("itself", [False, True])
def test_autograd_gives_the_oracles_gradient(itself):
    vectors = random(4, 6, 5).transpose(1, 2).requires_grad_()
    out = dot_interaction(vectors, itself=itself)
    expected = dot_interaction_reference(vectors, itself=itself)
    torch.testing.assert_close(out, expected)
    grad_out = random(out.shape[1], out.shape[0], seed=1).T
    (got,) = torch.autograd.grad(out, vectors, grad_out)
    (grad,) = torch.autograd.grad(expected, vectors, grad_out)
    torch.testing.assert_close(got, grad)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
def test_compiled_by_torch_it_is_one_graph_with_the_same_result():
    vectors = random(4, 6, 8).requires_grad_()

    def function(vectors: torch.Tensor) -> torch.Tensor:
        return dot_interaction(vectors * 2.0).square()

    results = []
    for called in (function, torch.compile(function, fullgraph=True)):
        out = called(vectors)
        results.append((out, *torch.autograd.grad(out.sum(), vectors)))
    torch.testing.assert_close(results[1], results[0])


def test_float64_takes_the_plain_way():
    vectors = random(2, 3, 4).double()
    assert torch.equal(dot_interaction(vectors), dot_interaction_reference(vectors))


def test_without_the_compiled_module_the_definition_is_used():
    code = """
import sys
sys.modules["dqrm.kernels._native"] = None
import torch
from dqrm.kernels.interaction import *
from dqrm.kernels import cpu
vectors = torch.randn(3, 4, 5, requires_grad=True)
out = dot_interaction(vectors, itself=True)
assert torch.equal(out, dot_interaction_reference(vectors, itself=True))
out.sum().backward()
(grad,) = torch.autograd.grad(dot_interaction_reference(vectors, itself=True).sum(), vectors)
torch.testing.assert_close(vectors.grad, grad)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
