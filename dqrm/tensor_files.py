"""Safetensors files: those of a model's weights, and our own formats.

A file of our own holds tensors, and a header in JSON that names the format.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tensors(
    path: Path, what: str, name: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors, memory-mapped, of a file.

    Args:
        path: of the file.
        what: it should be, for people, as in "packed model".
        name: of the format, in the header as ``format``.
        version: in the header as ``format_version``.

    Raises:
        ValueError: the file is damaged, or of another format or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header: dict[str, Any] = {key: json.loads(value) for key, value in metadata.items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a {what}: {error}") from error
    if header.get("format") != name or header.get("format_version") != version:
        raise ValueError(
            f"{path} is no {what} this dqrm reads: format {header.get('format')!r} "
            f"version {header.get('format_version')}, wanted {name!r} version {version}"
        )
    return header, tensors


def require_whole(folder: Path) -> None:
    """Look for damage in the weights of a model's folder, before others stumble over it.

    Raises:
        ValueError: a file is cut short, or no safetensors; the message names it.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged; copy or write it again: {error}") from error
