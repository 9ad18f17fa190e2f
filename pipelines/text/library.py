"""The one place that imports transformers, when something needs it."""

import importlib
import os
from importlib import metadata, util
from typing import Any

INSTALL = "pip install 'dqrm[transformers]'"


def missing_reason() -> str | None:
    """Why transformers cannot be used, or None."""
    if util.find_spec("transformers") is None:
        return f"needs transformers; install it with: {INSTALL}"
    version = metadata.version("transformers")
    if int(version.partition(".")[0]) != 5:
        return f"needs transformers 5, and {version} is installed: {INSTALL}"
    return None


def import_transformers() -> Any:
    """Import transformers, told to be quiet and to stay within this process's threads.

    It then reads lowered models as well.

    Raises:
        ValueError: it is not installed, or another major version is; the message names the fix.
    """
    reason = missing_reason()
    if reason is not None:
        raise ValueError(reason)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        # The tokenizers' own pool; it is made on first use.
        os.environ.setdefault("RAYON_NUM_THREADS", threads)
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    importlib.import_module("dqrm.compress.lower.hf")
    return transformers
