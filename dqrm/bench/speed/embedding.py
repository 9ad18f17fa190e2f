"""Embedding tables in training: forward alone, or forward, backward and update."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dqrm.bench.speed.contestants import Call, Entry
from dqrm.bench.speed.limits import gather_entries
from dqrm.bench.speed.peers import peer_module
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.compress.config import Bits
from dqrm.models.embedding import EmbeddingBagCollection, Table
from dqrm.training.config import OptimConfig
from dqrm.training.row_optimizers import RowOptimizer

Update = Literal["none", "sgd", "adagrad", "adam"]

LEARNING_RATE = 0.01
_INITIAL = 0.01
"""Weights are drawn from [-0.01, 0.01]; times do not depend on them."""
_GRADIENT = 1e-3
"""Gradients are drawn from N(0, 1e-6), so that hours of rounds end in no infinity."""


class OurTables:
    """Our collection and its row optimizer, called as our training step calls them."""

    def __init__(self, shape: Shape, bits: Bits, update: Update) -> None:
        self.collection = our_collection(shape, bits)
        self.optimizer = (
            None
            if update == "none"
            else RowOptimizer(self.collection, OptimConfig(name=update, lr=LEARNING_RATE))
        )

    def start(self, traffic: Traffic) -> Call:
        """Take int32 ids, the type that prepared data holds."""
        ring = [ids.flatten().to(torch.int32) for ids in traffic.batches]
        gradient = _gradients(traffic)
        pooled = torch.empty_like(gradient)
        collection, optimizer = self.collection, self.optimizer

        def forward(number: int) -> None:
            collection.lookup(ring[traffic.pick(number)], None, pooled)

        def train(number: int) -> None:
            assert optimizer is not None
            ids = ring[traffic.pick(number)]
            collection.lookup(ids, None, pooled)
            optimizer.update(ids, None, gradient, LEARNING_RATE)

        return forward if optimizer is None else train


def our_collection(shape: Shape, bits: Bits) -> EmbeddingBagCollection:
    """Return our tables, one exact scale each where ``bits`` is below 32."""
    return EmbeddingBagCollection(
        [Table(f"C{number + 1}", rows, bits) for number, rows in enumerate(shape.rows)], shape.dim
    )


def _gradients(traffic: Traffic) -> Tensor:
    """Gradient of the pooled vectors, float32 [B, T, D]."""
    generator = torch.Generator().manual_seed(1)
    size = (traffic.batch, len(traffic.shape.rows), traffic.shape.dim)
    return torch.randn(size, generator=generator) * _GRADIENT


class TorchTables:
    """One torch.nn.EmbeddingBag a table, with sparse gradients, and an optimizer of torch."""

    def __init__(
        self, shape: Shape, optimizer: Callable[[list[nn.Parameter]], "StepOnly"] | None
    ) -> None:
        self.bags = torch_bags(shape)
        parameters: list[nn.Parameter] = [p for bag in self.bags for p in bag.parameters()]
        self.optimizer = None if optimizer is None else optimizer(parameters)
        self.parameters = parameters

    def start(self, traffic: Traffic) -> Call:
        """Cut batches into a tensor of ids a table beforehand."""
        ring = [ids.unbind(0) for ids in traffic.batches]
        offsets = torch.arange(traffic.batch)
        gradients = [g.contiguous() for g in _gradients(traffic).unbind(1)]
        bags, parameters, optimizer = self.bags, self.parameters, self.optimizer

        def forward(number: int) -> None:
            with torch.no_grad():
                for bag, ids in zip(bags, ring[traffic.pick(number)], strict=True):
                    bag(ids, offsets)

        def train(number: int) -> None:
            assert optimizer is not None
            batch = ring[traffic.pick(number)]
            pooled = [bag(ids, offsets) for bag, ids in zip(bags, batch, strict=True)]
            torch.autograd.backward(pooled, gradients)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None

        return forward if optimizer is None else train


class StepOnly(Protocol):
    """The part of torch.optim.Optimizer that is used."""

    def step(self) -> None:
        """Apply the gradients."""


def torch_bags(shape: Shape) -> list[nn.EmbeddingBag]:
    """Return torch's own tables."""
    return [
        nn.EmbeddingBag(
            rows,
            shape.dim,
            mode="sum",
            sparse=True,
            _weight=torch.empty(rows, shape.dim).uniform_(-_INITIAL, _INITIAL),
        )
        for rows in shape.rows
    ]


class TorchRowWiseAdagrad(StepOnly):
    """Row-wise Adagrad in torch's operators, as facebookresearch/dlrm has it.

    Args:
        parameters: tables with sparse gradients.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums = [torch.zeros(len(parameter)) for parameter in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients, duplicates summed first."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            total.index_add_(0, rows, values.square().mean(dim=1))
            divisor = total.index_select(0, rows).sqrt_().add_(1e-8).unsqueeze_(1)
            parameter.index_add_(0, rows, values / divisor, alpha=-LEARNING_RATE)


class FbgemmTables:
    """FBGEMM's table-batched embeddings with their fused optimizer.

    Their check of indices is off: it is theirs to spare, ours always checks.
    """

    def __init__(self, shape: Shape, update: Literal["none", "sgd", "adagrad"]) -> None:
        self.tables = fbgemm_tables(shape, "adagrad" if update == "adagrad" else "sgd")
        self.trains = update != "none"

    def start(self, traffic: Traffic) -> Call:
        """Take int64 ids and offsets, which it handles no slower than int32."""
        ring = [ids.flatten() for ids in traffic.batches]
        offsets = torch.arange(traffic.lookups + 1)
        gradient = _gradients(traffic).flatten(1)
        tables = self.tables

        def forward(number: int) -> None:
            with torch.no_grad():
                tables(ring[traffic.pick(number)], offsets)

        def train(number: int) -> None:
            tables(ring[traffic.pick(number)], offsets).backward(gradient)

        return train if self.trains else forward


def fbgemm_tables(shape: Shape, update: Literal["sgd", "adagrad"]) -> Any:
    """Return SplitTableBatchedEmbeddingBagsCodegen on the CPU. Raises Unavailable."""
    training = peer_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = peer_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs = peer_module("fbgemm_gpu.split_embedding_configs")
    place = (common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    kind = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ROWWISE_ADAGRAD"}[update]
    tables = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, shape.dim, *place) for rows in shape.rows],
        optimizer=configs.EmbOptimType[kind],
        learning_rate=LEARNING_RATE,
        stochastic_rounding=False,
        bounds_check_mode=common.BoundsCheckMode.NONE,
    )
    tables.init_embedding_weights_uniform(-_INITIAL, _INITIAL)
    return tables


def embedding_entries(shape: Shape, update: Update) -> list[Entry]:
    """Return everybody who trains embedding tables this way, and the limit."""
    row_bytes = 4 * shape.dim
    state = {"none": 0, "sgd": 0, "adagrad": 4 * shape.total_rows, "adam": 2 * shape.fp32_bytes}
    needed = shape.fp32_bytes + state[update]
    ours: list[tuple[str, Bits]] = [("dqrm INT4", 4), ("dqrm FP32", 32)]

    def entry(name: str, build: Callable[[], Any], needed: int = needed) -> Entry:
        role: Literal["ours", "peer"] = "ours" if name.startswith("dqrm") else "peer"
        return Entry(name, role, build, bytes_needed=needed, row_bytes=row_bytes)

    def own(bits: Bits) -> Callable[[], OurTables]:
        return lambda: OurTables(shape, bits, update)

    entries = [entry(name, own(bits)) for name, bits in ours]
    if update == "none":
        entries += [
            entry("torch EmbeddingBag", lambda: TorchTables(shape, None)),
            entry("FBGEMM TBE", lambda: FbgemmTables(shape, "none")),
        ]
    elif update == "sgd":
        entries += [
            entry("torch EmbeddingBag + SGD", lambda: TorchTables(shape, _torch_sgd)),
            entry("FBGEMM EXACT_SGD", lambda: FbgemmTables(shape, "sgd")),
        ]
    elif update == "adagrad":
        full = 2 * shape.fp32_bytes
        entries += [
            entry("torch EmbeddingBag + Adagrad", lambda: TorchTables(shape, _torch_adagrad), full),
            entry("torch + row-wise Adagrad", lambda: TorchTables(shape, TorchRowWiseAdagrad)),
            entry("FBGEMM EXACT_ROWWISE_ADAGRAD", lambda: FbgemmTables(shape, "adagrad")),
        ]
    else:
        entries.append(
            entry("torch EmbeddingBag + SparseAdam", lambda: TorchTables(shape, _torch_adam))
        )
    return entries + gather_entries(shape, row_bytes)


def _torch_sgd(parameters: list[nn.Parameter]) -> Any:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def _torch_adagrad(parameters: list[nn.Parameter]) -> Any:
    return torch.optim.Adagrad(parameters, lr=LEARNING_RATE)


def _torch_adam(parameters: list[nn.Parameter]) -> Any:
    return torch.optim.SparseAdam(parameters, lr=LEARNING_RATE)
