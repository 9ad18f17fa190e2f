"""Fisher information, curvature, access frequency, and what is chosen by them."""

import itertools

import pytest
import torch
from torch import nn

from dqrm.compress.signals.allocate import Candidate, allocate
from dqrm.compress.signals.candidates import second_order_loss
from dqrm.compress.signals.curvature import (
    block_eigenvalue,
    hutchinson_trace,
    relative_curvature,
)
from dqrm.compress.signals.frequency import access_frequency
from dqrm.compress.signals.gradients import batch_gradients, fisher_diagonal
from dqrm.compress.signals.units import rearrange, search_units


def generator(seed):
    return torch.Generator().manual_seed(seed)


def small_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    return net, lambda: nn.functional.cross_entropy(net(x), y)


def exact_hessian(net, loss, parameters):
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def test_fisher_is_the_mean_square_of_the_gradients_of_batches():
    weight = torch.randn(3, 2, generator=generator(0), requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    batches = torch.randn(5, 4, 2, generator=generator(1))
    variables = {"weight": weight, "unused": unused}

    def losses():
        return ((batch @ weight.T).square().mean() for batch in batches)

    stacked = batch_gradients(variables, losses())
    assert stacked["weight"].shape == (5, 3, 2)
    for batch, gradient in zip(batches, stacked["weight"], strict=True):
        # d mean((x w)**2) / dw = 2 (x w) x / values.
        expected = 2 * (batch @ weight.detach().T).T @ batch / (4 * 3)
        torch.testing.assert_close(gradient, expected)
    fisher = fisher_diagonal(variables, losses())
    torch.testing.assert_close(fisher["weight"], stacked["weight"].square().mean(0))
    assert not fisher["unused"].any()
    moved = weight.detach() + 0.5
    expected = float((fisher["weight"] * 0.25).sum() / 2)
    assert second_order_loss(fisher["weight"], weight.detach(), moved) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no batch"):
        fisher_diagonal(variables, iter(()))


def test_hutchinson_trace_is_near_the_exact_one():
    net, loss = small_net(0)
    parameters = list(net.parameters())
    traces = hutchinson_trace(loss, parameters, 3000, generator(0))
    for parameter, trace in zip(parameters, traces, strict=True):
        exact = float(exact_hessian(net, loss, [parameter]).trace())
        assert trace == pytest.approx(exact, rel=0.05, abs=0.005)
    whole = float(exact_hessian(net, loss, parameters).trace())
    assert sum(traces) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("largest", [7.0, -7.0], ids=["positive", "negative"])
def test_eigenvalue_of_a_quadratic_with_a_known_spectrum(largest):
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator(2)).double())
    spectrum = torch.tensor([largest, 3.0, -2.5, 1, 0.5, 0.1, 0, 0]).double()
    matrix = basis @ torch.diag(spectrum) @ basis.T
    x = torch.randn(2, 4, generator=generator(3)).double().requires_grad_()

    def loss():
        return x.reshape(-1) @ matrix @ x.reshape(-1) / 2

    value = block_eigenvalue(loss, [x], generator(4), tolerance=1e-5)
    assert value == pytest.approx(largest, rel=0.01)


def test_eigenvalue_of_blocks_and_what_is_not_known():
    net, loss = small_net(1)
    for parameter in net.parameters():
        exact = torch.linalg.eigvalsh(exact_hessian(net, loss, [parameter]))
        value = block_eigenvalue(loss, [parameter], generator(0), tolerance=1e-6)
        assert value == pytest.approx(float(exact[exact.abs().argmax()]), rel=0.01)
    x = torch.ones(3, requires_grad=True)
    assert block_eigenvalue(lambda: x.sum(), [x], generator(0)) == 0.0
    assert block_eigenvalue(lambda: (x * torch.inf).square().sum(), [x], generator(0)) == 0.0
    # A zero eigenvalue is one that is not known: most care.
    assert relative_curvature([2.0, -4.0, 0.0]) == [0.5, 1.0, 1.0]
    assert relative_curvature([0.0, 0.0]) == [1.0, 1.0]


def test_access_frequency():
    shares = access_frequency([torch.tensor([[0, 3], [3, 3]]), torch.tensor([1])], 5)
    assert shares.tolist() == [0.2, 0.2, 0, 0.6, 0]
    with pytest.raises(ValueError, match="rows 1 to 5 of a table with 5 rows"):
        access_frequency([torch.tensor([1, 5])], 5)
    with pytest.raises(ValueError, match="no lookup"):
        access_frequency([], 5)


def random_items(count, seed, candidates=4):
    g = generator(seed)
    costs = torch.randint(1, 60, (count, candidates), generator=g).tolist()
    losses = torch.rand(count, candidates, generator=g).tolist()
    return [
        [Candidate(*pair) for pair in zip(*item, strict=True)]
        for item in zip(costs, losses, strict=True)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_allocation_equals_exhaustive_search(seed):
    items = random_items(7, seed, 3)
    choices = list(itertools.product(*(range(len(item)) for item in items)))

    def total(choice, field):
        return sum(getattr(item[n], field) for item, n in zip(items, choice, strict=True))

    cheapest = min(total(choice, "cost") for choice in choices)
    dearest = max(total(choice, "cost") for choice in choices)
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        budget = int(cheapest + share * (dearest - cheapest))
        chosen = allocate(items, budget)
        assert total(chosen, "cost") <= budget
        best = min(total(c, "loss") for c in choices if total(c, "cost") <= budget)
        assert total(chosen, "loss") == pytest.approx(best, abs=1e-12)


def test_allocation_of_many_and_what_cannot_be():
    items = random_items(72, 0, 9)
    budget = sum(min(c.cost for c in item) for item in items) * 2
    chosen = allocate(items, budget)
    costs = [item[n].cost for item, n in zip(items, chosen, strict=True)]
    assert sum(costs) <= budget
    assert max(c.cost for item in items for c in item) > budget - sum(costs)
    with pytest.raises(ValueError, match="the cheapest candidates cost"):
        allocate(items, 10)
    with pytest.raises(ValueError, match="not finite"):
        allocate([[Candidate(1, float("nan"))]], 10)


def fisher_values(widths, seed):
    g = generator(seed)
    return [torch.rand(width, generator=g) for width in widths]


@pytest.mark.parametrize("round_to", [1, 2])
def test_search_equals_exhaustive_search(round_to):
    heads, neurons = fisher_values([3, 3], 0), fisher_values([4, 4], 1)
    head_cost, neuron_cost = 5.0, 1.0
    for budget in (3.0, 9.0, 14.5, 21.0, 38.0):
        kept = search_units(heads, neurons, head_cost, neuron_cost, budget, round_to)
        counts = [int(mask.sum()) for mask in kept.neurons]
        assert all(count % round_to == 0 for count in counts)
        spent = sum(int(m.sum()) for m in kept.heads) * head_cost + sum(counts) * neuron_cost
        assert spent <= budget

        def value(head_bits, neuron_bits):
            pairs = zip((head_bits, neuron_bits), (heads, neurons), strict=True)
            return sum(float(torch.cat(f)[list(bits)].sum()) for bits, f in pairs)

        best = 0.0
        for head_bits in itertools.product([False, True], repeat=6):
            for neuron_bits in itertools.product([False, True], repeat=8):
                if sum(head_bits) * head_cost + sum(neuron_bits) * neuron_cost > budget:
                    continue
                if sum(neuron_bits[:4]) % round_to or sum(neuron_bits[4:]) % round_to:
                    continue
                best = max(best, value(head_bits, neuron_bits))
        found = value(torch.cat(kept.heads).tolist(), torch.cat(kept.neurons).tolist())
        assert found == pytest.approx(best)
    with pytest.raises(ValueError, match="pays for no unit"):
        search_units(heads, neurons, head_cost, neuron_cost, 0.5)


def test_a_budget_for_everything_keeps_everything():
    # Whatever the information: some of it zero, widths not multiples of the block.
    heads, neurons = fisher_values([3, 0, 2], 0), fisher_values([7, 5, 6], 1)
    heads[0][1], neurons[2][:] = 0.0, 0.0
    kept = search_units(heads, neurons, 1.3, 0.1, 5 * 1.3 + 18 * 0.1, 4)
    assert all(bool(mask.all()) for mask in [*kept.heads, *kept.neurons])


def removal_loss(kept, gradients):
    return float((gradients.double()[:, ~kept].sum(1) ** 2).sum())


def test_rearrangement_never_gets_worse_and_finds_units_that_cancel_out():
    for seed in range(20):
        gradients = torch.randn(6, 10, generator=generator(seed))
        kept = torch.randperm(10, generator=generator(seed)) < 4
        better = rearrange(kept, gradients)
        assert int(better.sum()) == 4
        assert removal_loss(better, gradients) <= removal_loss(kept, gradients) + 1e-9
    g = torch.randn(8, generator=generator(1))
    other = torch.randn(8, generator=generator(2))
    # Unit 2 says more than unit 1, but nothing at all when unit 0 goes with it.
    gradients = torch.stack([g, 0.5 * other, -g, 3 * other], dim=1)
    kept = torch.tensor([False, False, True, True])
    assert rearrange(kept, gradients).tolist() == [False, True, False, True]
    everything = torch.ones(4, dtype=torch.bool)
    assert rearrange(everything, gradients).all()
