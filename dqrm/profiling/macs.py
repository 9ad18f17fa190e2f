"""Multiply-accumulates of operators.

A MAC is one multiplication and one addition: two FLOPs. Only what multiplies matrices counts, as
in torch.utils.flop_counter, whose formulas are used where it has them. On CPUs it has none for
attention, for oneDNN's linear layers and for 8-bit products, and counts them as zero.
"""

import math
from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import flop_registry

Formula = Callable[[tuple[Any, ...], Any], int]


def operator_macs(function: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """MACs of one call of an operator, ``torch.ops.aten.mm.default`` for example."""
    packet = function.overloadpacket
    formula = _FORMULAS.get(str(packet))
    if formula is not None:
        return formula(arguments, result)
    known = flop_registry.get(packet)
    return 0 if known is None else int(known(*arguments, out_val=result)) // 2


def _attention(arguments: tuple[Any, ...], result: Any) -> int:
    query, key, value = (tensor.shape for tensor in arguments[:3])
    return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _linear(arguments: tuple[Any, ...], result: Any) -> int:
    return int(result.numel()) * int(arguments[0].shape[-1])


def _lstm_layer(arguments: tuple[Any, ...], result: Any) -> int:
    steps, batch, _ = arguments[0].shape
    return int(steps * batch * (arguments[1].numel() + arguments[2].numel()))


def _interaction(arguments: tuple[Any, ...], result: Any) -> int:
    rows, _, dim = arguments[0].shape
    # The dense vector is copied; each of the other values is a product of two vectors.
    return int(rows * (result.shape[1] - dim) * dim)


_FORMULAS: dict[str, Formula] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._int_mm": _linear,
    "aten._weight_int8pack_mm": _linear,
    "aten._weight_int4pack_mm_for_cpu": _linear,
    "aten._dyn_quant_matmul_4bit": _linear,
    "mkl._mkl_linear": _linear,
    "mkldnn._linear_pointwise": _linear,
    "aten.mkldnn_rnn_layer": _lstm_layer,
    "onednn.qlinear_pointwise": _linear,
    "quantized.linear_dynamic": _linear,
    "dqrm.dot_interaction": _interaction,
}
