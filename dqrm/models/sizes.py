"""Bytes of a model by arithmetic, before anything is allocated."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dqrm.compress.config import QuantConfig
from dqrm.compress.grids import packed_row_bytes
from dqrm.kernels.maxima import bound_nodes
from dqrm.kernels.row_storage import stored_row_bytes
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import interaction_width, table_bits
from dqrm.training.config import OptimConfig


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of one model in its forms."""

    fp32_bytes: int
    """All parameters in FP32."""
    packed_bytes: int
    """Codes, scales and FP32 biases of the packed model, vocabularies not counted."""
    training_bytes: int
    """Parameters, optimizer state and maxima resident in training; activations not counted."""
    training_row_bytes: int
    """Of these, what a row takes with its optimizer state."""
    embedding_rows: int
    """Rows of all tables."""
    mlp_parameters: int
    """Weights and biases of both MLPs."""


def model_sizes(
    model: ModelConfig,
    quant: QuantConfig,
    optim: OptimConfig,
    *,
    num_dense: int,
    tables: Sequence[tuple[str, int]],
) -> ModelSizes:
    """Return the sizes of the model these settings would build.

    Args:
        model: shape of the network.
        quant: bits and granularity.
        optim: the optimizer whose state is counted.
        num_dense: dense columns of the data set.
        tables: name and rows of each table.
    """
    dim = model.embedding_dim
    rows = sum(count for _, count in tables)
    bits = table_bits([name for name, _ in tables], quant)
    packed = sum(
        packed_table_bytes(count, dim, b, quant.granularity)
        for (_, count), b in zip(tables, bits, strict=True)
    )
    bottom = [num_dense, *model.bottom_mlp, dim]
    top = [interaction_width(model, len(tables)), *model.top_mlp, 1]
    parameters = 0
    for widths, exempt in (
        (bottom, 0 if quant.skip_first_layer else None),
        (top, len(model.top_mlp) if quant.skip_last_layer else None),
    ):
        for position, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            parameters += (fan_in + 1) * fan_out
            if quant.mlp_bits == 32 or position == exempt:
                packed += 4 * (fan_in + 1) * fan_out
            else:
                packed += fan_out * (packed_row_bytes(fan_in, quant.mlp_bits) + 4 + 4)
    fp32 = 4 * (rows * dim + parameters)
    # One number a row or two an element, in what the storage lets the optimizer keep.
    per_row = {"sgd": 0, "adagrad": 1, "adam": 2 * dim}[optim.name]
    per_parameter = {"sgd": 0, "adagrad": 1, "adam": 2}[optim.name]
    state_value_bytes = 4 if quant.storage == "fp32" else 2
    row_bytes = stored_row_bytes(quant.storage, dim) + per_row * state_value_bytes
    quantized = [count for (_, count), b in zip(tables, bits, strict=True) if b < 32]
    exact = quant.granularity == "table" and not quant.scale_period
    maxima = 4 * bound_nodes(quantized) if exact else 0
    return ModelSizes(
        fp32_bytes=fp32,
        packed_bytes=packed,
        training_bytes=rows * row_bytes + 4 * parameters * (1 + per_parameter) + maxima,
        training_row_bytes=row_bytes,
        embedding_rows=rows,
        mlp_parameters=parameters,
    )


def packed_table_bytes(rows: int, dim: int, bits: int, granularity: str) -> int:
    """Return the bytes of one table in a packed model, its scales included."""
    scales = 0 if bits == 32 else 1 if granularity == "table" else rows
    return rows * packed_row_bytes(dim, bits) + 4 * scales
