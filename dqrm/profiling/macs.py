"""Multiply-accumulates of operators and modules.

A MAC is one multiplication and one addition: two FLOPs. Only what multiplies matrices counts, as
in torch.utils.flop_counter, whose formulas are used where it has them. On CPUs it has none for
attention, for oneDNN's linear layers and for 8-bit products, and counts them as zero.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from dqrm.compress.lower.modules import CodeEmbedding, Int8Linear
from dqrm.serving.packed_mlp import PackedLinear, PackedMlp

Formula = Callable[[tuple[Any, ...], Any], int]


def operator_macs(function: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """MACs of one call of an operator, ``torch.ops.aten.mm.default`` for example."""
    packet = function.overloadpacket
    formula = _FORMULAS.get(str(packet))
    if formula is not None:
        return formula(arguments, result)
    known = flop_registry.get(packet)
    return 0 if known is None else int(known(*arguments, out_val=result)) // 2


def module_macs(module: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, int] | None:
    """MACs of a module that runs without torch's operators, by the layers in it; None otherwise.

    Args:
        module: any.
        inputs: of its forward.
    """
    if isinstance(module, Int8Linear):
        layers: list[Int8Linear | PackedLinear] = [module]
    elif isinstance(module, PackedMlp):
        layers = [layer for layer in module if isinstance(layer, PackedLinear)]
    else:
        return None
    rows = math.prod(inputs[0].shape[:-1]) if inputs and isinstance(inputs[0], Tensor) else 0
    return {layer: rows * layer.codes.numel() for layer in layers}


def _attention(arguments: tuple[Any, ...], result: Any) -> int:
    query, key, value = (tensor.shape for tensor in arguments[:3])
    return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _linear(arguments: tuple[Any, ...], result: Any) -> int:
    return int(result.numel()) * int(arguments[0].shape[-1])


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
    "onednn.qlinear_pointwise": _linear,
    "quantized.linear_dynamic": _linear,
    "dqrm.dot_interaction": _interaction,
}


def own_parameters(module: nn.Module) -> list[tuple[int, int]]:
    """Identity and number of the values each tensor of a module holds, its children's left out.

    What training calls a parameter, in whatever form it is kept: FP32, rows of tables, codes.
    """
    tables = getattr(module, "tables", None)
    dim = getattr(module, "embedding_dim", None)
    if isinstance(tables, tuple) and isinstance(dim, int):
        return [(id(module), dim * sum(int(table.num_rows) for table in tables))]
    if isinstance(module, PackedLinear):
        return [(id(module), module.codes.numel() + module.bias.numel())]
    if isinstance(module, Int8Linear | CodeEmbedding):
        bias = getattr(module, "bias", None)
        return [(id(module), module.codes.numel() + (0 if bias is None else bias.numel()))]
    return [(id(p), p.numel()) for p in module._parameters.values() if p is not None]


def own_bytes(module: nn.Module) -> list[tuple[int, int]]:
    """Address and bytes of each storage of a module, its children's left out."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages]
