"""The packed model: one safetensors file with codes, scales, vocabularies and settings.

    emb_l.<table>.codes   packed rows (dqrm.compress.grids.pack); FP32 rows at 32 bits
    emb_l.<table>.scale   float32 [1] or [rows]; absent at 32 bits
    bot_l.<n>.codes, .scale, .bias   a quantized layer; .weight, .bias a layer in FP32
    vocabulary.<column>   uint64 keys; the id of a key is its position + 1

The header's metadata holds the model's shape, the bits of its activations, the schema of its
input and the digest of the columns and vocabularies it was trained with, as JSON.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dqrm import __version__
from dqrm.compress import grids
from dqrm.compress.linear import QuantLinear
from dqrm.data.encode import RowEncoder
from dqrm.data.files import new_file
from dqrm.data.schema import Schema
from dqrm.kernels import huge_pages
from dqrm.models.config import ModelConfig
from dqrm.models.dlrm import DLRM, build_interaction, build_mlp, interaction_width
from dqrm.models.embedding import EmbeddingBagCollection, Table
from dqrm.serving.packed import PackedEmbeddingBags
from dqrm.serving.packed_mlp import PackedLinear, PackedMlp
from dqrm.tensor_files import read_tensors

FORMAT = "dqrm-artifact"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A packed model read back, ready to predict."""

    model: DLRM
    encoder: RowEncoder
    features_digest: str
    packed_bytes: int
    """Bytes of the model's own tensors; vocabularies not counted."""


def save_artifact(
    path: Path,
    model: DLRM,
    config: ModelConfig,
    encoder: RowEncoder,
    features_digest: str,
    tables: Iterable[EmbeddingBagCollection] | None = None,
) -> int:
    """Write the packed form of a trained model to ``path``, atomically.

    Args:
        path: the file to write.
        model: in the state to ship; its ``emb_l`` is an EmbeddingBagCollection where ``tables`` is
            not given.
        config: the shape it was built with.
        encoder: turns raw rows into the model's ids; its vocabularies travel along.
        features_digest: identifies the columns and vocabularies the model was trained with.
        tables: all tables in their order, some at a time, where the model has not all of them.

    Returns:
        Bytes of the model's tensors, vocabularies and header not counted.
    """
    if tables is None:
        if not isinstance(model.emb_l, EmbeddingBagCollection):
            raise TypeError("only a trainable model can be packed; this one is packed already")
        tables = [model.emb_l]
    tensors: dict[str, Tensor] = {}
    packed: list[Table] = []
    for collection in tables:
        tensors |= _pack_tables(collection)
        packed += collection.tables
    tensors |= _pack_mlp("bot_l", model.bot_l)
    tensors |= _pack_mlp("top_l", model.top_l)
    packed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dqrm_version": __version__,
        "model": config.model_dump(mode="json"),
        "num_dense": _linears(model.bot_l)[0][1].in_features,
        "tables": [asdict(table) for table in packed],
        "schema": encoder.schema.model_dump(mode="json"),
        "features_digest": features_digest,
        "activation_bits": 8 if _takes_integers(model) else 32,
    }
    for column, keys in encoder.vocabularies.items():
        tensors[f"vocabulary.{column}"] = torch.from_numpy(keys.copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(value) for key, value in header.items()}
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return packed_bytes


def load_artifact(path: Path) -> Artifact:
    """Read a file written by :func:`save_artifact`; tensors are memory-mapped.

    Large tables are copied into memory on huge pages, which a mapped file cannot have: random
    rows come 1.5 times as fast.

    Raises:
        ValueError: the file is no artifact, damaged, or of a newer format.
    """
    header, tensors = read_tensors(path, "packed model", FORMAT, FORMAT_VERSION)
    config = ModelConfig.model_validate(header["model"])
    tables = [Table(**table) for table in header["tables"]]
    prefix = "vocabulary."
    vocabularies = {
        name.removeprefix(prefix): tensors.pop(name).numpy()
        for name in list(tensors)
        if name.startswith(prefix)
    }
    packed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    bot_l = build_mlp(
        [header["num_dense"], *config.bottom_mlp, config.embedding_dim], 32, final_relu=True
    )
    top_l = build_mlp([interaction_width(config, len(tables)), *config.top_mlp, 1], 32)
    integer = header.get("activation_bits", 32) == 8
    bot_l = _unpack_mlp("bot_l", bot_l, tensors, integer)
    top_l = _unpack_mlp("top_l", top_l, tensors, integer)
    emb_l = PackedEmbeddingBags(
        tables,
        [_on_huge_pages(tensors[f"emb_l.{table.name}.codes"]) for table in tables],
        [tensors.get(f"emb_l.{table.name}.scale") for table in tables],
        config.embedding_dim,
        config.pooling,
    )
    model = DLRM(bot_l, emb_l, build_interaction(config, len(tables)), top_l).eval()
    schema = Schema.model_validate(header["schema"])
    encoder = RowEncoder(schema, vocabularies)
    return Artifact(model, encoder, header["features_digest"], packed_bytes)


def _on_huge_pages(mapped: Tensor) -> Tensor:
    if mapped.nbytes < huge_pages.SMALLEST_BYTES or not huge_pages.available():
        return mapped
    return huge_pages.empty(*mapped.shape, dtype=mapped.dtype).copy_(mapped)


def _pack_tables(collection: EmbeddingBagCollection) -> dict[str, Tensor]:
    tensors = {}
    for number, (table, rows) in enumerate(
        zip(collection.tables, collection.table_rows(), strict=True)
    ):
        if table.bits == 32:
            tensors[f"emb_l.{table.name}.codes"] = rows.to(torch.float32, copy=True)
            continue
        codes, scale = collection.packed(number)
        tensors[f"emb_l.{table.name}.codes"] = codes
        tensors[f"emb_l.{table.name}.scale"] = scale
    return tensors


def _linears(mlp: nn.Sequential) -> list[tuple[int, nn.Linear]]:
    return [(number, layer) for number, layer in enumerate(mlp) if isinstance(layer, nn.Linear)]


def _pack_mlp(name: str, mlp: nn.Sequential) -> dict[str, Tensor]:
    tensors = {}
    for number, layer in _linears(mlp):
        prefix = f"{name}.{number}"
        tensors[f"{prefix}.bias"] = layer.bias.detach().clone()
        if isinstance(layer, QuantLinear):
            tensors[f"{prefix}.codes"] = grids.pack(layer.codes(), layer.bits)
            tensors[f"{prefix}.scale"] = layer.scale()[:, 0].clone()
        else:
            tensors[f"{prefix}.weight"] = layer.weight.detach().clone()
    return tensors


def _takes_integers(model: DLRM) -> bool:
    return any(
        isinstance(layer, QuantLinear) and layer.activation_bits == 8
        for mlp in (model.bot_l, model.top_l)
        for _, layer in _linears(mlp)
    )


@torch.no_grad()
def _unpack_mlp(
    name: str, mlp: nn.Sequential, tensors: dict[str, Tensor], integer: bool
) -> nn.Sequential:
    """Fill in the layers of ``mlp``; those with codes are replaced if their inputs are integers."""
    for number, layer in _linears(mlp):
        prefix = f"{name}.{number}"
        bias = tensors[f"{prefix}.bias"]
        packed = tensors.get(f"{prefix}.codes")
        if packed is None:
            layer.bias.copy_(bias)
            layer.weight.copy_(tensors[f"{prefix}.weight"])
            continue
        bits = 8 if packed.dtype == torch.int8 else 4
        codes = grids.unpack(packed, bits, layer.in_features)
        scale = tensors[f"{prefix}.scale"]
        if integer:
            mlp[number] = PackedLinear(codes.to(torch.int8), scale, bias)
        else:
            layer.bias.copy_(bias)
            layer.weight.copy_(grids.dequantize(codes, scale[:, None]))
    return PackedMlp(*mlp) if integer else mlp
