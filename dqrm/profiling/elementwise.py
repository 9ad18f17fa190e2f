"""FLOPs of operators that multiply no matrices, counted as DeepSpeed's profiler counts them.

One FLOP for each value, whatever the function is, and for each value that is summed; five of a
norm with a weight, four of one without. Pooling embeddings, quantizing and moving count nothing,
nor does the bias that an operator adds to its product.
"""

import math
from typing import Any

import torch
from torch import Tensor

_MOVES = {"clone", "where", "masked_fill", "masked_fill_"}
"""torch counts them among the elementwise ones."""

_SOFTMAX = {"_softmax", "_log_softmax", "_safe_softmax"}

_NORM_WEIGHT = {
    "native_layer_norm": 2,
    "native_group_norm": 1,
    "native_batch_norm": 1,
    "_native_batch_norm_legit_no_training": 1,
    "_fused_rms_norm": 2,
}
"""Which argument is the weight; the first is the input."""

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def elementwise_flops(function: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """FLOPs of one call of an operator, without those of products of matrices."""
    namespace, _, name = str(function.overloadpacket).partition(".")
    if namespace != "aten" or name in _MOVES:
        return 0
    if name == _ATTENTION:
        # The softmax of the scores, [batch, heads, queries, keys].
        return int(math.prod(arguments[0].shape[:-1]) * arguments[1].shape[-2])
    if name in _NORM_WEIGHT:
        weighted = arguments[_NORM_WEIGHT[name]] is not None
        return int(arguments[0].numel()) * (5 if weighted else 4)
    if torch.Tag.pointwise in function.tags or name in _SOFTMAX:
        counted = result
    elif torch.Tag.reduction in function.tags:
        counted = arguments[0]
    else:
        return 0
    return counted.numel() if isinstance(counted, Tensor) and counted.is_floating_point() else 0
