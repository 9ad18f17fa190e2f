"""A compressed model as a folder in Hugging Face's format.

    config.json        the model's own, and how to read the packed weights: quantization_config
    model.safetensors  <module>.weight_codes, _places and _scale of every compressed weight
                       (dqrm.compress.lower.packing); all other tensors as they are

The folder needs nothing else to be read, no state of training and no file of records.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqrm.compress.grids.record import codes, weight_record
from dqrm.compress.lower.build import Target
from dqrm.compress.lower.packing import NAMES, PackedWeight, pack_weight
from dqrm.compress.lower.tensors import dense_tensors, in_layers
from dqrm.data.files import new_file, write_json

METHOD: Final = "dqrm"
"""The quant_method of the configuration."""

WEIGHTS_FILE: Final = "model.safetensors"

_PREFIX = "weight_"


def pack_model(model: nn.Module, *, shrink: bool = True) -> dict[str, PackedWeight]:
    """Return the packed weights of the modules with a record, by the modules' names."""
    packed = {}
    for name, module in model.named_modules():
        record = weight_record(module)
        if record is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        try:
            with torch.no_grad():
                packed[name] = pack_weight(codes(weight.detach(), record), record, shrink=shrink)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return packed


def write_lowered(
    model: Any, folder: Path, *, target: Target = "int8", shrink: bool = True
) -> dict[str, PackedWeight]:
    """Write a model of transformers with its compressed weights packed; return these.

    Args:
        model: whose compressed modules have records (dqrm.compress.grids.record).
        folder: is made if need be.
        target: what the folder says that readers should run it with.
        shrink: deflate packed weights that get smaller by it.

    Raises:
        ValueError: no module has a record, so that there are no integers to run.
    """
    packed = pack_model(model, shrink=shrink)
    if not packed and target == "int8":
        raise ValueError("nothing to run on integers: no weight of the model is compressed")
    tensors = {name: tensor.contiguous() for name, tensor in dense_tensors(model, packed).items()}
    for name, weight in packed.items():
        tensors |= {tensor_name(name, part): data for part, data in weight.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": METHOD,
        "target": target,
        "modules": {name: weight.layout.to_json() for name, weight in packed.items()},
    }
    with new_file(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return packed


def set_target(folder: Path, target: Target) -> None:
    """Make a lowered folder say that readers should run it with ``target``."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["target"] = target
    write_json(path, config)


def tensor_name(module: str, part: str) -> str:
    """Name in the file of a packed weight's tensor."""
    return f"{module}.{_PREFIX}{part}"


def packed_tensors(file: Path, module: str) -> dict[str, tuple[list[int], str]]:
    """Return shape and type (as safetensors names it) of a packed weight's tensors, by part."""
    found = {}
    with safe_open(file, "pt") as tensors:
        there = set(tensors.keys())
        for part in NAMES:
            name = tensor_name(module, part)
            if name in there:
                data = tensors.get_slice(name)
                found[part] = (list(data.get_shape()), data.get_dtype())
    return found


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of every tensor in a folder's safetensors, from their headers."""
    sizes = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                data = tensors.get_slice(name)
                sizes[name] = math.prod(data.get_shape()) * _bits(data.get_dtype()) // 8
    return sizes


def encoder_bytes(folder: Path) -> int:
    """Return the bytes on disk of a model's layers, their biases and norms among them."""
    return sum(size for name, size in tensor_bytes(folder).items() if in_layers(name))


def _bits(dtype: str) -> int:
    """Of a value: safetensors writes types as F32, BF16, U8, BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8
