"""From packed weights to a model that runs."""

from typing import Literal

import torch
from torch import Tensor, nn

from dqrm.compress.grids.granularity import matrix_shape
from dqrm.compress.grids.record import WeightRecord, dequantize, set_weight_record
from dqrm.compress.lower.modules import CodeEmbedding, Int8Linear, SharedInput
from dqrm.compress.transforms.activations import attach_activation_quantizer

Target = Literal["int8", "bf16", "fp32"]


def build_linear(
    codes: Tensor, record: WeightRecord, bias: Tensor | None, target: Target
) -> nn.Module:
    """Return a linear layer of a packed weight.

    Args:
        codes: float32 [N, K].
        record: of the weight.
        bias: float32 [N], or None.
        target: int8 multiplies integers where inputs have 8 bits and each output one scale of
            weights of up to 8 bits; what is left is FP32, on the same grids, and so is a weight
            without values. fp32 has all so. bf16 leaves inputs off their grid, and makes an FP32
            layer that is yet to be converted.
    """
    scale = _row_scale(record, codes)
    # A layer that lost all heads or neurons has nothing to multiply, which engines do not take.
    integers = record.activation_bits == 8 and codes.numel() > 0
    integers = integers and no_integers_because(codes, record) is None
    if target == "int8" and integers and scale is not None:
        return Int8Linear(codes.to(torch.int8), scale, bias)
    outputs, inputs = codes.shape
    layer = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight = nn.Parameter(dequantize(codes, record), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    if target != "bf16":
        set_weight_record(layer, record)
        if record.activation_bits == 8:
            attach_activation_quantizer(layer, 8, record.activation_grid)
    return layer


def no_integers_because(codes: Tensor, record: WeightRecord) -> str | None:
    """Return why a layer with 8-bit inputs cannot multiply integers; None if it can, or has none.

    Codes of an asymmetric grid are counted from its zero, so that the zero is folded into them;
    those of up to 7 bits always fit, those of 8 bits where zero is in the middle.
    """
    if record.activation_bits != 8 or record.grid == "fp32":
        return None
    if record.activation_grid != "symmetric":
        return "inputs are on asymmetric grids"
    if record.bits > 8:
        return "weights have more than 8 bits"
    if _row_scale(record, codes) is None:
        return "an output has several scales"
    if codes.numel() and not -128 <= int(codes.min()) <= int(codes.max()) <= 127:
        return "8-bit weights on asymmetric grids are up to 255 codes from zero"
    return None


def build_embedding(
    codes: Tensor, record: WeightRecord, padding_idx: int | None, target: Target
) -> nn.Module:
    """Return a table of a packed weight, codes float32 [R, D]; int8 keeps it as codes."""
    by_row = record.granularity.kind in ("row", "tensor")
    if target == "int8" and by_row and record.grid != "fp32" and record.bits <= 8:
        if record.zero is None:
            return CodeEmbedding(codes.to(torch.int8), record.scale)
        zero = record.zero - (1 << (record.bits - 1))
        return CodeEmbedding((codes + zero).to(torch.int8), record.scale, zero)
    table = nn.Embedding(codes.shape[0], codes.shape[1], padding_idx, device="meta")
    table.weight = nn.Parameter(dequantize(codes, record), requires_grad=False)
    if target != "bf16":
        set_weight_record(table, record)
    return table


def share_inputs(model: nn.Module) -> None:
    """Let integer layers side by side, such as query, key and value, be one product.

    Those of one parent with inputs of the same width are tried; see SharedInput.
    """
    for parent in model.modules():
        by_width: dict[int, list[Int8Linear]] = {}
        for child in parent.children():
            if isinstance(child, Int8Linear):
                by_width.setdefault(child.in_features, []).append(child)
        for layers in by_width.values():
            if len(layers) > 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer.shared = shared


def _row_scale(record: WeightRecord, codes: Tensor) -> Tensor | None:
    """The scale of each output, float32 [N]; None where it has several, or none."""
    if record.grid == "fp32" or record.bits > 8:
        return None
    rows, columns = matrix_shape(codes.shape)
    kind, size = record.granularity.kind, record.granularity.size
    scale = record.scale.flatten()
    if kind == "tensor":
        return scale.repeat(rows)
    if kind == "row_groups" and rows % size == 0:
        return scale.repeat_interleave(rows // size)
    if kind == "row" or (kind == "k_groups" and size >= columns):
        return scale.contiguous()
    return None
