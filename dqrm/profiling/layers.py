"""The project's own modules: what they hold, and what they do where torch's operators do not tell.

Symbols: B rows of an input, T tables, N looked-up ids, D embedding_dim, R rows of a table.
"""

import math
from typing import Any

from torch import Tensor, nn

from dqrm.compress.lower.modules import CodeEmbedding, Int8Linear
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.profiling.traffic import distinct_rows, total_bytes
from dqrm.profiling.work import Work
from dqrm.serving.packed import PackedEmbeddingBags
from dqrm.serving.packed_mlp import PackedLinear, PackedMlp

_FLOAT_BYTES = 4


def has_formula(module: nn.Module) -> bool:
    """Whether native loops do the work of a module, so that a formula has to say what it is."""
    kinds = Int8Linear | PackedMlp | EmbeddingBagCollection | PackedEmbeddingBags
    return isinstance(module, kinds)


def formula_works(module: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[nn.Module, Work]]:
    """Return what one call of such a module does, by the layers in it.

    Args:
        module: of which :func:`has_formula` is true.
        inputs: of its forward.
    """
    rows = math.prod(inputs[0].shape[:-1])
    if isinstance(module, Int8Linear):
        work = _product(module, rows)
        work.moved_bytes += _FLOAT_BYTES * rows * (module.in_features + module.out_features)
        return [(module, work)]
    if isinstance(module, PackedMlp):
        return _stacks(module, rows)
    indices, offsets = inputs[0], inputs[1] if len(inputs) > 1 else None
    return [(module, Work(moved_bytes=_bags_bytes(module, indices, offsets)))]


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


def kept_part(module: nn.Module) -> float:
    """Part of the weights of a layer that are not zero; 1 without a matrix of weights."""
    weight = getattr(module, "codes", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.numel():
        return 1.0
    return int(weight.count_nonzero()) / weight.numel()


def _product(layer: Int8Linear | PackedLinear, rows: int) -> Work:
    """Without the input and the output."""
    macs = rows * layer.codes.numel()
    weights = total_bytes((layer.codes, layer.scale, layer.bias))
    return Work(macs=macs, moved_bytes=weights, flops_by_type={"int8": 2 * macs})


def _stacks(mlp: PackedMlp, rows: int) -> list[tuple[nn.Module, Work]]:
    """Neighbouring layers run as one, whose values in between stay in caches."""
    works: list[tuple[nn.Module, Work]] = []
    last: Work | None = None
    width = 0
    for layer in [*mlp, None]:
        if isinstance(layer, PackedLinear):
            work = _product(layer, rows)
            if last is None:
                work.moved_bytes += _FLOAT_BYTES * rows * layer.codes.shape[1]
            last, width = work, layer.codes.shape[0]
            works.append((layer, work))
        elif isinstance(layer, nn.ReLU) and last is not None:
            flops = rows * width
            works.append((layer, Work(elementwise=flops, flops_by_type={"float32": flops})))
        elif last is not None:
            last.moved_bytes += _FLOAT_BYTES * rows * width
            last = None
    return works


def _bags_bytes(module: nn.Module, indices: Tensor, offsets: Tensor | None) -> int:
    """Of different rows, ids, where bags begin, and pooled values."""
    if isinstance(module, EmbeddingBagCollection):
        rows = distinct_rows(indices, offsets, len(module.tables))
        read = sum(rows) * module.weight[:1].nbytes
        if module.granularity == "table":
            read += module.table_scale.nbytes
    else:
        assert isinstance(module, PackedEmbeddingBags)
        rows = distinct_rows(indices, offsets, len(module.tables))
        read = 0
        for number, count in enumerate(rows):
            read += count * module.get_buffer(f"codes{number}")[:1].nbytes
            scale = getattr(module, f"scale{number}")
            if scale is not None:
                read += min(count, len(scale)) * scale.element_size()
    bags = len(indices) if offsets is None else len(offsets) - 1
    written = _FLOAT_BYTES * bags * module.embedding_dim
    return read + total_bytes((indices, offsets)) + written
