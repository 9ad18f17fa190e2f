"""Whole training steps: one process alone, and ranks that exchange their gradients."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import distributed

from dqrm.bench.exchange.turns import Runner
from dqrm.bench.speed.dense import NUM_DENSE
from dqrm.bench.speed.embedding import LEARNING_RATE
from dqrm.bench.speed.step import RING, dense_and_labels
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.comm.exchange import Exchange
from dqrm.compress.config import QuantConfig
from dqrm.data.batch import Batch
from dqrm.kernels.mlp import StackPrecision
from dqrm.launch import find_place
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import DLRM, build_dlrm
from dqrm.training.config import ExchangeConfig, OptimConfig
from dqrm.training.consensus import Consensus, Wishes
from dqrm.training.exchanged_step import ExchangedStep, make_exchange
from dqrm.training.optimizer import Optimizer
from dqrm.training.step import FusedStep
from dqrm.training.world import World

ALONE = "one process alone"
APART = "all ranks, no exchange"
RowsAs = Literal["fp32", "int8", "int4"]
CODECS: dict[str, tuple[RowsAs, Literal["fp32", "int8"]]] = {
    "INT8 rows, INT8 MLPs": ("int8", "int8"),
    "INT4 rows, INT8 MLPs": ("int4", "int8"),
    "codecs off": ("fp32", "fp32"),
}


class StepWork:
    """The model of the Criteo Kaggle recipe at 4 bits, trained with SGD.

    Contestants share its tables, and have MLPs of their own: gradients lie beside the weights. That
    the tables of the ranks grow apart by those that exchange nothing changes no time.

    Args:
        shape: the tables.
        backend: that the world was joined over.
        precision: of the products in the MLPs.
    """

    def __init__(self, shape: Shape, backend: str, precision: StackPrecision = "bf16") -> None:
        tables = [(f"C{number + 1}", rows) for number, rows in enumerate(shape.rows)]
        quant = QuantConfig(bits=4, mlp_bits=4)
        torch.manual_seed(0)
        self.model = build_dlrm(
            ModelConfig(embedding_dim=shape.dim), quant, num_dense=NUM_DENSE, tables=tables
        )
        self.world = World(find_place(), backend)
        self.precision = precision
        self.exchanges: dict[str, Exchange] = {}
        """By the contestant's name."""
        alone = FusedStep(*self._twin(), precision)
        apart = FusedStep(*self._twin(), precision)
        self._steps: dict[str, Callable[[Batch, int], float]] = {
            ALONE: alone if self.world.is_main else lambda batch, number: 0.0,
            APART: apart,
        }
        for name, (rows, dense) in CODECS.items():
            model, optimizer = self._twin()
            exchange = make_exchange(optimizer, ExchangeConfig(rows=rows, dense=dense), 0)
            consensus = Consensus(self.world, lambda: Wishes())
            self.exchanges[name] = exchange
            self._steps[name] = ExchangedStep(
                model, optimizer, exchange, self.world, consensus, precision
            )

    def _twin(self) -> tuple[DLRM, Optimizer]:
        tables = self.model.emb_l
        model = copy.deepcopy(self.model, {id(tables): tables})
        model.train()
        return model, Optimizer(model, OptimConfig(name="sgd", lr=LEARNING_RATE))

    def runners(self, traffic: Traffic) -> list[Runner]:
        """Return all contestants on this rank's batches."""
        columns, whole = dense_and_labels(traffic.batch), traffic.batch * self.world.size
        ids = [batch.flatten().to(torch.int32) for batch in traffic.batches]

        def ring(whole_rows: int) -> list[Batch]:
            return [
                Batch(columns[n % RING][0], own, None, columns[n % RING][1], whole_rows)
                for n, own in enumerate(ids)
            ]

        shared, own = ring(whole), ring(traffic.batch)

        def runner(name: str, step: Callable[[Batch, int], float]) -> Runner:
            batches = shared if name in self.exchanges else own
            return Runner(name, lambda number: step(batches[traffic.pick(number)], number))

        return [runner(name, step) for name, step in self._steps.items()]

    def close(self) -> None:
        """End the exchanges."""
        for exchange in self.exchanges.values():
            exchange.close()
        distributed.barrier()
