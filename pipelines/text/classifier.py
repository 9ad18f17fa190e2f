"""Sequence classifiers and regressors in Hugging Face's format."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.library import import_transformers
from dqrm.pipelines.text.tables import Labels


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder."""
    return import_transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def load_classifier(folder: Path, labels: Labels, seed: int) -> Any:
    """Read a model, with a head for ``labels``.

    A head of that width is kept; any other is made anew, from ``seed``, which also seeds torch.

    Args:
        folder: in Hugging Face's format. The encoder of any sequence classifier will do.
        labels: what the head says.
        seed: of a new head, and of the dropout that follows.

    Raises:
        ValueError: the folder holds no such model.
    """
    transformers = import_transformers()
    torch.manual_seed(seed)
    names: dict[str, Any] = {"num_labels": labels.num_outputs}
    if labels.classes is None:
        names["problem_type"] = "regression"
    else:
        names["problem_type"] = "single_label_classification"
        names["id2label"] = dict(enumerate(labels.classes))
        names["label2id"] = {name: position for position, name in names["id2label"].items()}
    try:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            str(folder),
            local_files_only=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **names,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no sequence classifier can be read: {error}") from error


def load_any(folder: Path) -> Any:
    """Read the model of a folder as what it was saved as; without a head where it has none.

    Raises:
        ValueError: the folder holds no model that transformers knows.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        saved_as = (config.architectures or [""])[0]
        auto = (
            transformers.AutoModelForSequenceClassification
            if saved_as.endswith("ForSequenceClassification")
            else transformers.AutoModel
        )
        return auto.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no transformer can be read: {error}") from error


def save_classifier(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer in Hugging Face's format, weights as safetensors."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def count_parameters(folder: Path) -> int | None:
    """Parameters in a folder's safetensors, read from their headers; None where it has none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return total if files else None


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@torch.no_grad()
def predict_text(model: Any, text: EncodedText, batch_size: int, *, bf16: bool = False) -> Tensor:
    """Return the logits, float32 [rows, outputs], in the order of the table.

    The model is put into evaluation mode for the time and back afterwards.
    """
    was_training = model.training
    model.eval()
    logits = torch.zeros(len(text), model.config.num_labels)
    try:
        for rows in text.in_order_of_length(batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits[rows] = model(**text.batch(rows)).logits.float()
    finally:
        model.train(was_training)
    return logits
