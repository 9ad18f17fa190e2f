"""The exchange below DistributedDataParallel, many buckets under way at once.

A hook that waits inside a callback hangs here with three buckets; the watchdog would end it.
"""

import pytest
import torch
from backends_here import BACKENDS
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from dqrm.comm import Blocks, Cast, Exchange, Largest, Policy, Recipe, RefusedError, Signs
from dqrm.comm.ddp import HookState, exchange_hook, register

STEPS = 5


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(48, 48), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(48, 1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(16, 48, generator=torch.Generator().manual_seed(100 * step + rank))


def exchange_for(module: nn.Module, policy: Policy, group: distributed.ProcessGroup) -> Exchange:
    names = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return Exchange(policy, names, group=group)


def trained(ddp: nn.Module, rank: int, lr: float = 0.05) -> list[Tensor]:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss: Tensor = ddp(batch(rank, step)).square().mean()
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in ddp.parameters()]


def hooked(
    rank: int, policy: Policy, group: distributed.ProcessGroup, buckets: list[int], view: bool
) -> tuple[list[Tensor], Exchange]:
    ddp = DistributedDataParallel(network(), bucket_cap_mb=0.006, gradient_as_bucket_view=view)
    exchange = exchange_for(ddp.module, policy, group)

    def counted(state: HookState, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        return exchange_hook(state, bucket)

    ddp.register_comm_hook(HookState(exchange, ddp.module), counted)
    weights = trained(ddp, rank)
    exchange.require_equal({str(i): weight for i, weight in enumerate(weights)}).wait(20)
    assert exchange.step == STEPS
    return weights, exchange


def hooks_work(rank: int, world: int) -> None:
    group = distributed.new_group()
    expected = trained(DistributedDataParallel(network()), rank)
    for view in (False, True):
        buckets: list[int] = []
        weights, exchange = hooked(rank, Policy([("*", Recipe(Cast()))]), group, buckets, view)
        assert max(buckets) >= 2, buckets
        for got, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(got, wanted)
        exchange.close(20)
    mixed = [("*.bias", Recipe(Cast())), ("10.*", Recipe(Signs(64))), ("*", Recipe(Blocks()))]
    policies = [
        Policy(mixed),
        Policy([("*", Recipe(Blocks(4, 64), algorithm="scatter"))]),
        Policy([("*", Recipe(Largest(0.2)))], warmup_steps=2),
    ]
    for policy in policies:
        weights, exchange = hooked(rank, policy, group, [], True)
        if policy is policies[0]:
            for got, wanted in zip(weights, expected, strict=True):
                torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.1)
        assert exchange.residual_norms()
        exchange.close(20)


def a_bad_gradient_ends_the_backward_pass(rank: int, world: int) -> None:
    ddp = DistributedDataParallel(network())
    exchange = exchange_for(ddp.module, Policy([("*", Recipe(Blocks()))]), distributed.new_group())
    register(ddp, exchange)
    inputs = batch(rank, 0)
    if rank == 0:
        inputs[0, 0] = torch.inf
    with pytest.raises(Exception, match="has NaN or infinity") as caught:
        ddp(inputs).mean().backward()
    assert isinstance(caught.value, RefusedError | RuntimeError)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [2, 3])
def test_hooks(world: int, backend: str) -> None:
    run_world(hooks_work, world, backend=backend, timeout=60)


def test_bad_gradients() -> None:
    run_world(a_bad_gradient_ends_the_backward_pass, 2, timeout=40)
