"""The records of a model on the disk, beside its weights.

    <folder>/compression.safetensors    <module>.scale, float32, of every record with a grid
                                        <module>.zero, float32, of every asymmetric one

The header's metadata holds the rest of each record, as JSON.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import (
    WeightRecord,
    check_weight_record,
    set_weight_record,
    weight_record,
)
from dqrm.data.files import new_file
from dqrm.tensor_files import read_tensors

RECORDS_FILE = "compression.safetensors"
_FORMAT = "dqrm-compression"
_FORMAT_VERSION = 1


def records(model: nn.Module) -> dict[str, WeightRecord]:
    """Return the records of a model's modules by the modules' names."""
    found = {name: weight_record(module) for name, module in model.named_modules()}
    return {name: record for name, record in found.items() if record is not None}


def save_records(folder: Path, model: nn.Module) -> None:
    """Write the records of ``model`` beside its weights in ``folder``, atomically.

    Raises:
        ValueError: a weight has changed since its record was made, and could not be read again.
    """
    found = records(model)
    for name, record in found.items():
        try:
            check_weight_record(model.get_submodule(name), record)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    tensors = {
        f"{name}.scale": record.scale.contiguous()
        for name, record in found.items()
        if record.grid != "fp32"
    }
    tensors |= {
        f"{name}.zero": record.zero.contiguous()
        for name, record in found.items()
        if record.zero is not None
    }
    described = {name: _described(record) for name, record in found.items()}
    header = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "records": described}
    metadata = {key: json.dumps(value) for key, value in header.items()}
    with new_file(folder / RECORDS_FILE) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_records(folder: Path) -> dict[str, WeightRecord]:
    """Return the records in a folder by module; none where it has no file of them.

    Raises:
        ValueError: the file is damaged or of a newer format.
    """
    path = folder / RECORDS_FILE
    if not path.is_file():
        return {}
    header, tensors = read_tensors(path, "file of records", _FORMAT, _FORMAT_VERSION)
    return {
        name: _record(described, tensors.get(f"{name}.scale"), tensors.get(f"{name}.zero"))
        for name, described in header["records"].items()
    }


def load_records(folder: Path, model: nn.Module) -> dict[str, WeightRecord]:
    """Put the records in ``folder`` on the modules of a model whose weights were loaded.

    Inputs of modules trained on 8-bit activations are quantized from then on. The model computes
    what it did when the records were saved.

    Raises:
        ValueError: the file is damaged, names a module the model does not have, or a weight is
            not on its grid.
    """
    from dqrm.compress.transforms.activations import attach_activation_quantizer

    found = read_records(folder)
    for name, record in found.items():
        try:
            module = model.get_submodule(name)
            set_weight_record(module, record)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{folder / RECORDS_FILE}: {name}: {error}") from error
        if record.activation_bits == 8:
            attach_activation_quantizer(module, 8, record.activation_grid)
    return found


def _described(record: WeightRecord) -> dict[str, Any]:
    return {
        "grid": record.grid,
        "bits": record.bits,
        "granularity": asdict(record.granularity),
        "mask": None if record.mask is None else asdict(record.mask),
        "activation_bits": record.activation_bits,
        "activation_grid": record.activation_grid,
    }


def _record(
    described: dict[str, Any], scale: torch.Tensor | None, zero: torch.Tensor | None
) -> WeightRecord:
    mask = described["mask"]
    return WeightRecord(
        grid=described["grid"],
        bits=described["bits"],
        granularity=Granularity(**described["granularity"]),
        scale=torch.empty(0) if scale is None else scale,
        mask=None if mask is None else NM(**mask),
        activation_bits=described["activation_bits"],
        zero=zero,
        # Older files have symmetric ones alone.
        activation_grid=described.get("activation_grid", "symmetric"),
    )
