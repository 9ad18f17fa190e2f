"""Reading lowered models with transformers. Importing this module is all it takes:

    import dqrm.compress.lower.hf
    model = AutoModelForSequenceClassification.from_pretrained(folder)

The model then runs as the folder says: on integers (int8), in bf16, or in FP32.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqrm.compress.lower.build import (
    Target,
    build_embedding,
    build_linear,
    no_integers_because,
    share_inputs,
)
from dqrm.compress.lower.folder import METHOD, packed_tensors
from dqrm.compress.lower.packing import Layout, PackedWeight, unpack_weight
from dqrm.compress.lower.shapes import restore_shapes
from dqrm.tensor_files import require_whole

_TYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "F16": torch.float16,
    "F32": torch.float32,
}

log = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class DqrmConfig(QuantizationConfigMixin):
    """The quantization_config of a lowered model.

    Args:
        modules: by name, the layouts of packed weights.
        target: what the model runs with.
    """

    def __init__(
        self, modules: dict[str, Any] | None = None, target: Target = "int8", **others: Any
    ) -> None:
        if target not in get_args(Target):
            raise ValueError(f"target={target}: must be {', '.join(get_args(Target))}")
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an enumeration
        self.modules = modules or {}
        self.target = target


@register_quantizer(METHOD)
class DqrmQuantizer(HfQuantizer):
    """Puts packed modules in the places of a model's own before tensors are read, and what runs
    in theirs afterwards."""

    quantization_config: DqrmConfig

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Only bf16 has all of the model in another type: integer layers give FP32."""
        return torch.bfloat16 if self.quantization_config.target == "bf16" else torch.float32

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        restore_shapes(model)
        (file,) = options["checkpoint_files"]
        for name, described in self.quantization_config.modules.items():
            layout = Layout.from_json(described)
            shapes = packed_tensors(Path(file), name)
            model.set_submodule(name, _Packed(model.get_submodule(name), layout, shapes))
        model.all_tied_weights_keys = _tied_without(
            {f"{name}.weight" for name in self.quantization_config.modules},
            model.all_tied_weights_keys,
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        target = self.quantization_config.target
        kept_off: Counter[str] = Counter()
        for name in self.quantization_config.modules:
            packed = model.get_submodule(name)
            try:
                built, reason = packed.build(target)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            model.set_submodule(name, built)
            if reason is not None and target == "int8":
                kept_off[reason] += 1
        for reason, count in kept_off.items():
            log.warning("%d layers run in FP32, not on integers: %s", count, reason)
        if target == "bf16":
            model.to(torch.bfloat16)
        share_inputs(model)
        return model.eval()

    def is_serializable(self) -> bool:
        """What runs is not what is stored; the folder it came from is."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No gradients pass through integers."""
        return False


class _Packed(nn.Module):
    """Takes the tensors of a packed weight while a model is read."""

    bias: Tensor | None

    def __init__(
        self, module: nn.Module, layout: Layout, tensors: dict[str, tuple[list[int], str]]
    ) -> None:
        super().__init__()
        self._layout = layout
        self._parts = tuple(tensors)
        self._is_table = isinstance(module, nn.Embedding)
        # Some models initialize the weights of their parts, by these two names, whatever was read.
        # This one is none that is looked for in the file, and is left alone as if it had been read.
        self.padding_idx = getattr(module, "padding_idx", None)
        self.weight = torch.empty(layout.shape, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        for part, (shape, dtype) in tensors.items():
            empty = torch.empty(shape, dtype=_TYPES[dtype], device="meta")
            self.register_buffer(f"weight_{part}", empty)
        has_bias = getattr(module, "bias", None) is not None
        bias = torch.empty(layout.shape[0], dtype=torch.float32, device="meta")
        self.register_buffer("bias", bias if has_bias else None)

    def build(self, target: Target) -> tuple[nn.Module, str | None]:
        """Return the module that runs, and why it cannot multiply integers, though inputs are."""
        tensors = {part: getattr(self, f"weight_{part}") for part in self._parts}
        codes, record = unpack_weight(PackedWeight(self._layout, tensors))
        if self._is_table:
            return build_embedding(codes, record, self.padding_idx, target), None
        return build_linear(codes, record, self.bias, target), no_integers_because(codes, record)


def _tied_without(packed: Set[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return which weight is the same as which, among those that are not packed.

    Args:
        packed: weights that are read for themselves.
        tied: what transformers would tie, each weight to the one it takes its value from.
    """
    found: dict[str, str] = {}
    stand_ins: dict[str, str] = {}
    for weight, source in tied.items():
        if weight in packed:
            continue
        if source in packed:
            source = stand_ins.setdefault(source, weight)
        if source != weight:
            found[weight] = source
    return found


def load_lowered(folder: str | Path, target: Target | None = None) -> Any:
    """Read a lowered model as what it was saved as, in evaluation mode.

    Args:
        folder: that :func:`dqrm.compress.lower.folder.write_lowered` wrote.
        target: instead of the one the folder names.

    Raises:
        ValueError: the folder holds no lowered model, or a damaged one.
    """
    try:
        require_whole(Path(folder))
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        stored = getattr(config, "quantization_config", None) or {}
        if stored.get("quant_method") != METHOD:
            raise ValueError("its weights are not packed by dqrm")
        if target is not None:
            config.quantization_config = {**stored, "target": target}
        saved_as = (config.architectures or [""])[0]
        auto: Any = (
            transformers.AutoModelForSequenceClassification
            if saved_as.endswith("ForSequenceClassification")
            else transformers.AutoModel
        )
        return auto.from_pretrained(str(folder), config=config, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no lowered model can be read: {error}") from error
