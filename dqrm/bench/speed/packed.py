"""Packed 4-bit tables as they are served."""

from typing import Any

import torch
from torch import Tensor

from dqrm.bench.speed.contestants import Call, Entry
from dqrm.bench.speed.limits import gather_entries
from dqrm.bench.speed.peers import peer_module
from dqrm.bench.speed.traffic import Shape, Traffic
from dqrm.compress import grids
from dqrm.models.embedding import Table
from dqrm.serving.packed import PackedEmbeddingBags

BITS = 4
PEER_ROW_PARAMETERS_BYTES = 4
"""A scale and a bias of 16 bits that peers keep in every row; we keep one scale a table."""


class OurPackedTables:
    """Tables of our artifact with one scale each."""

    def __init__(self, shape: Shape) -> None:
        tables = [Table(f"C{number + 1}", rows, BITS) for number, rows in enumerate(shape.rows)]
        codes = [
            _random_bytes(rows, grids.packed_row_bytes(shape.dim, BITS)) for rows in shape.rows
        ]
        scales = [torch.tensor([0.01]) for _ in shape.rows]
        self.tables = PackedEmbeddingBags(tables, codes, scales, shape.dim, "sum")

    def start(self, traffic: Traffic) -> Call:
        """Take int32 ids, the type that prepared data holds."""
        ring = [ids.flatten().to(torch.int32) for ids in traffic.batches]
        tables = self.tables

        def call(number: int) -> None:
            with torch.inference_mode():
                tables(ring[traffic.pick(number)])

        return call


class TorchPackedTables:
    """torch.ops.quantized.embedding_bag_4bit_rowwise_offsets, a call a table."""

    def __init__(self, shape: Shape) -> None:
        width = grids.packed_row_bytes(shape.dim, BITS) + PEER_ROW_PARAMETERS_BYTES
        self.tables = [_random_rows(rows, width) for rows in shape.rows]

    def start(self, traffic: Traffic) -> Call:
        """Cut batches into a tensor of ids a table beforehand."""
        ring = [ids.unbind(0) for ids in traffic.batches]
        offsets = torch.arange(traffic.batch)
        look_up: Any = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default
        tables = self.tables

        def call(number: int) -> None:
            with torch.inference_mode():
                for table, ids in zip(tables, ring[traffic.pick(number)], strict=True):
                    look_up(table, ids, offsets)

        return call


class FbgemmPackedTables:
    """FBGEMM's IntNBitTableBatchedEmbeddingBagsCodegen at 4 bits."""

    def __init__(self, shape: Shape) -> None:
        inference = peer_module("fbgemm_gpu.split_table_batched_embeddings_ops_inference")
        common = peer_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        sparse = peer_module("fbgemm_gpu.split_embedding_configs").SparseType
        place = common.EmbeddingLocation.HOST
        self.tables = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
            [
                (f"C{number + 1}", rows, shape.dim, sparse.INT4, place)
                for number, rows in enumerate(shape.rows)
            ],
            device="cpu",
            bounds_check_mode=common.BoundsCheckMode.NONE,
            output_dtype=sparse.FP32,
        )
        self.tables.fill_random_weights()

    def start(self, traffic: Traffic) -> Call:
        """Take int32 ids, its own default."""
        ring = [ids.flatten().to(torch.int32) for ids in traffic.batches]
        offsets = torch.arange(traffic.lookups + 1, dtype=torch.int32)
        tables = self.tables

        def call(number: int) -> None:
            with torch.inference_mode():
                tables(ring[traffic.pick(number)], offsets)

        return call


def _random_bytes(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def _random_rows(rows: int, width: int) -> Tensor:
    """Rows of random codes, with a scale and a bias of 0.01 in FP16 at their end."""
    packed = _random_bytes(rows, width)
    packed[:, -PEER_ROW_PARAMETERS_BYTES:] = torch.tensor([0.01, 0.01]).half().view(torch.uint8)
    return packed


def packed_entries(shape: Shape) -> list[Entry]:
    """Return everybody who looks packed rows up, and the limit for rows of our width."""
    ours = grids.packed_row_bytes(shape.dim, BITS)
    theirs = ours + PEER_ROW_PARAMETERS_BYTES
    rows = shape.total_rows
    return [
        Entry("dqrm INT4", "ours", lambda: OurPackedTables(shape), rows * ours, ours),
        Entry("torch 4-bit", "peer", lambda: TorchPackedTables(shape), rows * theirs, theirs),
        Entry("FBGEMM IntNBit", "peer", lambda: FbgemmPackedTables(shape), rows * theirs, theirs),
        *gather_entries(shape, ours),
    ]
