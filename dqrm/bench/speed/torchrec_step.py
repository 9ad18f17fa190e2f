"""TorchRec's own DLRM, sharded over one process, its optimizer fused into FBGEMM's tables."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.bench.speed.contestants import Call
from dqrm.bench.speed.dense import mlp_widths
from dqrm.bench.speed.embedding import LEARNING_RATE
from dqrm.bench.speed.peers import peer_module
from dqrm.bench.speed.traffic import Shape, Traffic


class TorchRecStep:
    """A step of torchrec.models.dlrm.DLRM under DistributedModelParallel with bfloat16 autocast.

    Args:
        shape: the tables.
        columns: makes dense columns and labels of a batch size.
    """

    def __init__(self, shape: Shape, columns: Callable[[int], list[tuple[Tensor, Tensor]]]) -> None:
        embedding = peer_module("torchrec.modules.embedding_modules")
        configs = peer_module("torchrec.modules.embedding_configs")
        dlrm = peer_module("torchrec.models.dlrm")
        parallel = peer_module("torchrec.distributed.model_parallel")
        fused = peer_module("torchrec.optim.apply_optimizer_in_backward")
        _join_group_of_one()
        for name in ("torchrec", "torch.fx"):  # advice on planning for many machines, on tracing
            logging.getLogger(name).setLevel(logging.ERROR)
        self.keys = [f"C{number + 1}" for number in range(len(shape.rows))]
        collection = embedding.EmbeddingBagCollection(
            tables=[
                configs.EmbeddingBagConfig(
                    name=key, embedding_dim=shape.dim, num_embeddings=rows, feature_names=[key]
                )
                for key, rows in zip(self.keys, shape.rows, strict=True)
            ],
            device=torch.device("meta"),
        )
        fused.apply_optimizer_in_backward(
            torch.optim.SGD, collection.parameters(), {"lr": LEARNING_RATE}
        )
        bottom, top = mlp_widths(shape)
        model: nn.Module = dlrm.DLRM(
            collection,
            dense_in_features=bottom[0],
            dense_arch_layer_sizes=bottom[1:],
            over_arch_layer_sizes=top[1:],
            dense_device=torch.device("cpu"),
        )
        self.model: Any = parallel.DistributedModelParallel(
            model, device=torch.device("cpu"), plan=_fused_plan(model, self.keys)
        )
        dense = [p for name, p in self.model.named_parameters() if "embedding_bags" not in name]
        self.optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)
        self.columns = columns

    def start(self, traffic: Traffic) -> Call:
        """Make KeyedJaggedTensors beforehand."""
        sparse = peer_module("torchrec.sparse.jagged_tensor")
        lengths = torch.ones(traffic.lookups, dtype=torch.int32)
        offsets = torch.arange(traffic.lookups + 1)
        ring = [
            sparse.KeyedJaggedTensor(self.keys, ids.flatten(), lengths=lengths, offsets=offsets)
            for ids in traffic.batches
        ]
        columns = self.columns(traffic.batch)
        model, optimizer = self.model, self.optimizer

        def call(number: int) -> float:
            dense, label = columns[number % len(columns)]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(dense, ring[traffic.pick(number)])
            loss = functional.binary_cross_entropy_with_logits(logits.float().squeeze(1), label)
            value = loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return value

        return call


def _fused_plan(model: nn.Module, keys: list[str]) -> Any:
    """Ask for FBGEMM's fused tables throughout: left alone, small tables get dense gradients."""
    planner = peer_module("torchrec.distributed.planner")
    types = peer_module("torchrec.distributed.planner.types")
    sharders = peer_module("torchrec.distributed.embeddingbag")
    constraint = types.ParameterConstraints(
        sharding_types=["table_wise"], compute_kernels=["fused"]
    )
    chosen = planner.EmbeddingShardingPlanner(
        topology=planner.Topology(world_size=1, compute_device="cpu"),
        constraints=dict.fromkeys(keys, constraint),
    )
    return chosen.plan(model, [sharders.EmbeddingBagCollectionSharder()])


def _join_group_of_one() -> None:
    distributed: Any = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
