"""Digests of settings, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_files(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted by path; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def folder_digest(folder: Path) -> str:
    """Digest of the names and bytes of a folder's files."""
    files = {str(path.relative_to(folder)): file_digest(path) for path in folder_files(folder)}
    return json_digest(files)
