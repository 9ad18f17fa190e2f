"""Whole training steps on the Criteo Kaggle recipe: forward, loss, backward, update."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.bench.speed.contestants import Call, Contestant, Entry
from dqrm.bench.speed.dense import NUM_DENSE, mlp_widths
from dqrm.bench.speed.embedding import LEARNING_RATE, fbgemm_tables, torch_bags
from dqrm.bench.speed.phases import phase_seconds
from dqrm.bench.speed.torch_model import TorchDense
from dqrm.bench.speed.torchrec_step import TorchRecStep
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.compress.config import QuantConfig
from dqrm.data.batch import Batch
from dqrm.kernels.mlp import StackPrecision
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import build_dlrm
from dqrm.training.config import OptimConfig
from dqrm.training.optimizer import Optimizer
from dqrm.training.step import FusedStep, make_step

POSITIVES = 0.256
"""Share of clicks in the Criteo Kaggle log."""
RING = 8
"""Batches of dense columns and labels; ids come in far more."""


def dense_and_labels(batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return dense columns (float32 [B, 13]) and labels (float32 [B])."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.rand(batch, NUM_DENSE, generator=generator),
            (torch.rand(batch, generator=generator) < POSITIVES).float(),
        )
        for _ in range(RING)
    ]


class OurStep:
    """A step of `dqrm train` with SGD.

    Args:
        shape: the tables.
        bits: of tables and MLP weights, scales exact at every step; 32 does not quantize.
        precision: of the products in the MLPs.
    """

    def __init__(
        self, shape: Shape, bits: Literal[4, 32], precision: StackPrecision = "bf16"
    ) -> None:
        tables = [(f"C{number + 1}", rows) for number, rows in enumerate(shape.rows)]
        model = ModelConfig(embedding_dim=shape.dim)
        quant = QuantConfig(bits=bits, mlp_bits=bits)
        self.model = build_dlrm(model, quant, num_dense=NUM_DENSE, tables=tables)
        self.model.train()
        optimizer = Optimizer(self.model, OptimConfig(name="sgd", lr=LEARNING_RATE))
        self.step = make_step(self.model, optimizer, precision)

    def start(self, traffic: Traffic) -> Call:
        """Make the batches that data loading hands out, with int32 ids."""
        columns = dense_and_labels(traffic.batch)
        ring = [
            Batch(columns[n % RING][0], ids.flatten().to(torch.int32), None, columns[n % RING][1])
            for n, ids in enumerate(traffic.batches)
        ]
        step = self.step

        def call(number: int) -> float:
            return step(ring[traffic.pick(number)], number)

        return call

    def phases(self, call: Call) -> dict[str, float]:
        """Return where the time of a started call goes."""
        if not isinstance(self.step, FusedStep):
            raise TypeError("only the fused step has phases")
        return phase_seconds(self.step, call)


class PeerStep:
    """A step of a peer: its tables, then torch's dense part and SGD.

    Args:
        shape: the tables.
        tables: "torch" for a sparse EmbeddingBag each, "fbgemm" for fused ones.
        bf16: whether the dense part runs under bfloat16 autocast.
        compiled: whether it is compiled by torch.compile.
    """

    def __init__(
        self, shape: Shape, tables: Literal["torch", "fbgemm"], *, bf16: bool, compiled: bool
    ) -> None:
        self.bf16 = bf16
        self.compiled = compiled
        self.dense = TorchDense(*mlp_widths(shape), len(shape.rows))
        parameters: list[nn.Parameter] = list(self.dense.parameters())
        self.bags: Sequence[nn.EmbeddingBag] | None = None
        self.fused: Any = None
        if tables == "torch":
            self.bags = torch_bags(shape)
            parameters += [weight for bag in self.bags for weight in bag.parameters()]
        else:
            self.fused = fbgemm_tables(shape, "sgd")
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def start(self, traffic: Traffic) -> Call:
        """Cut batches beforehand into what the tables take."""
        look_up = self._look_up(traffic)
        columns = dense_and_labels(traffic.batch)
        optimizer, bf16 = self.optimizer, self.bf16
        # A new function object: a compiled one belongs to one batch and one number of threads.
        forward: Any = torch.compile(self.dense, dynamic=False) if self.compiled else self.dense

        def call(number: int) -> float:
            dense, label = columns[number % RING]
            optimizer.zero_grad(set_to_none=True)
            pooled = look_up(traffic.pick(number))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = forward(dense, pooled)
            loss = functional.binary_cross_entropy_with_logits(logits.float(), label)
            value = loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return value

        return call

    def _look_up(self, traffic: Traffic) -> Callable[[int], Tensor]:
        if self.bags is not None:
            bags, ring = self.bags, [ids.unbind(0) for ids in traffic.batches]
            offsets = torch.arange(traffic.batch)

            def stacked(number: int) -> Tensor:
                pairs = zip(bags, ring[number], strict=True)
                return torch.stack([bag(ids, offsets) for bag, ids in pairs], dim=1)

            return stacked
        flat = [ids.flatten() for ids in traffic.batches]
        offsets = torch.arange(traffic.lookups + 1)
        size, fused = (traffic.batch, len(traffic.shape.rows), traffic.shape.dim), self.fused

        def batched(number: int) -> Tensor:
            pooled: Tensor = fused(flat[number], offsets)
            return pooled.view(size)

        return batched


def step_entries(shape: Shape) -> list[Entry]:
    """Return everybody who trains the whole model."""

    def peer(tables: Literal["torch", "fbgemm"], bf16: bool, compiled: bool) -> Any:
        return lambda: PeerStep(shape, tables, bf16=bf16, compiled=compiled)

    builds: list[tuple[str, Literal["ours", "peer"], Callable[[], Contestant]]] = [
        ("dqrm INT4", "ours", lambda: OurStep(shape, 4)),
        ("dqrm int8", "ours", lambda: OurStep(shape, 4, "int8")),
        ("dqrm FP32", "ours", lambda: OurStep(shape, 32)),
        ("torch eager FP32", "peer", peer("torch", False, False)),
        ("torch eager BF16", "peer", peer("torch", True, False)),
        ("torch.compile BF16", "peer", peer("torch", True, True)),
        ("FBGEMM + eager BF16", "peer", peer("fbgemm", True, False)),
        ("FBGEMM + torch.compile BF16", "peer", peer("fbgemm", True, True)),
        ("TorchRec BF16", "peer", lambda: TorchRecStep(shape, dense_and_labels)),
    ]
    return [
        Entry(name, role, build, shape.fp32_bytes, 4 * shape.dim) for name, role, build in builds
    ]
