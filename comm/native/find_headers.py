"""Prints the folder of oneCCL's headers that the package oneccl-cpu-devel brought, if it did."""

from importlib import metadata
from pathlib import Path

try:
    files = metadata.distribution("oneccl-cpu-devel").files or []
except metadata.PackageNotFoundError:
    files = []
for file in files:
    if file.name == "ccl.hpp" and file.parent.name == "oneapi":
        print(Path(str(file.locate())).resolve().parent.parent)
        break
