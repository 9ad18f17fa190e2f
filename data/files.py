"""Writing files and folders so that a reader sees all of one or nothing."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write; it becomes ``path`` when the block ends without an error.

    The content reaches the disk before the name does. Folders that are missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically and durably."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure of matplotlib to ``path``, in the format of its ending, atomically."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=dpi)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically and durably."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def finite_or_null(value: Any) -> Any:
    """Return a tree for JSON, which has no NaN and no infinities: None in their place."""
    if isinstance(value, dict):
        return {key: finite_or_null(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    An existing ``path`` is replaced. A process killed in between leaves ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            # A folder cannot be renamed onto a full one: move the old one away first.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
