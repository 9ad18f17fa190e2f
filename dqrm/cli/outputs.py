"""Files that a command writes at its end, maybe hours later: refused at once if they cannot be."""

import os
from pathlib import Path
from typing import Any

import click

_PICTURES = (".png", ".svg", ".pdf")


class OutputFile(click.Path):
    """Where to write a file; folders that are missing are made then.

    Args:
        endings: the name must have one of them; none given takes any name.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self._endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse other endings, and folders that could not be written to."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path), "path_type"
        if self._endings and path.suffix.lower() not in self._endings:
            known = ", ".join(self._endings)
            self.fail(f"{str(path)!r}: its name must end with one of {known}", param, ctx)
        require_folder(self, path.parent, param, ctx)
        return path


class PictureFile(OutputFile):
    """Where to draw a picture."""

    def __init__(self) -> None:
        super().__init__(*_PICTURES)


class OutputFolder(click.Path):
    """A folder for files; it is made then if it is missing."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a folder that could not be written to."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path), "path_type"
        require_folder(self, path, param, ctx)
        return path


def require_folder(
    kind: click.Path, folder: Path, param: click.Parameter | None, ctx: click.Context | None
) -> None:
    """Refuse a folder that neither is there nor can be made."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        kind.fail(f"{str(folder)!r}: {existing} is a file, not a folder", param, ctx)
    if not os.access(existing, os.W_OK | os.X_OK):
        kind.fail(f"{str(folder)!r}: nothing can be written into {existing}", param, ctx)
