"""The exchange below torch's DistributedDataParallel.

    exchange = Exchange(policy, {name: p.numel() for name, p in module.named_parameters()})
    ddp = DistributedDataParallel(module)
    register(ddp, exchange)

DDP hands over a bucket of gradients as soon as they are there, during the backward pass, and the
exchange replaces them by their mean while it goes on. Residuals belong to parameters and survive
that DDP cuts its buckets anew after the first step.
"""

from concurrent.futures import Future

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dqrm.comm.exchange import Exchange


class HookState:
    """What the hook knows: the exchange, and the names of parameters."""

    def __init__(self, exchange: Exchange, module: nn.Module) -> None:
        self.exchange = exchange
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}

    def names_of(self, bucket: GradBucket) -> tuple[str, ...]:
        """Return the names of a bucket's parameters, in the order of its buffer."""
        return tuple(self._names[id(parameter)] for parameter in bucket.parameters())


def exchange_hook(state: HookState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Take the mean of a bucket over all ranks; a communication hook of DDP.

    The step of the exchange goes up with every first bucket, and so with every backward pass that
    synchronizes. It returns at once: the communication thread completes the future.
    """
    buffer = bucket.buffer()
    if buffer.is_sparse:
        raise TypeError(
            f"{state.names_of(bucket)} have sparse gradients: exchange tables by reduce_rows"
        )
    if bucket.index() == 0:
        state.exchange.start_step(state.exchange.step + 1)
    future: torch.futures.Future[Tensor] = torch.futures.Future()

    def deliver(done: "Future[None]") -> None:
        error = done.exception()
        if error is None:
            future.set_result(buffer)
        else:
            future.set_exception(error)  # type: ignore[arg-type]

    state.exchange.reduce_flat(state.names_of(bucket), buffer).then(deliver)
    return future


def register(ddp: DistributedDataParallel, exchange: Exchange) -> HookState:
    """Let a DDP module exchange its gradients by an exchange made for its module's parameters."""
    state = HookState(exchange, ddp.module)
    ddp.register_comm_hook(state, exchange_hook)
    return state
