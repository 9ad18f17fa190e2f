"""Sequence classifiers and regressors in Hugging Face's format."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dqrm.compress.lower.shapes import record_shapes, restore_shapes
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.library import import_transformers
from dqrm.pipelines.text.pretrained import read_pretrained
from dqrm.pipelines.text.tables import Labels
from dqrm.tensor_files import require_whole
from dqrm.training.world import World

_WITH_HEAD = "ForSequenceClassification"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: there is none.
    """
    auto = import_transformers().AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer can be read: {error}") from error
    # Of a folder without its files, transformers makes one to which all words are unknown.
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if not any(character.isalnum() for word in words for character in word):
        raise ValueError(
            f"{folder}: holds no tokenizer, or one without words; save the model's there, with "
            "tokenizer.save_pretrained"
        )
    return tokenizer


def read_config(folder: Path) -> Any:
    """The configuration of a model's folder.

    Raises:
        OSError: there is none.
        ValueError: it is of no model that transformers knows.
    """
    auto = import_transformers().AutoConfig
    return auto.from_pretrained(str(folder), local_files_only=True)


def config_for(labels: Labels) -> Any:
    """The part of a classifier's configuration that tells its outputs."""
    return import_transformers().PretrainedConfig(
        architectures=[_WITH_HEAD], **_settings_of(labels)
    )


def has_head(config: Any) -> bool:
    """Whether a configuration is that of a classifier."""
    return str((config.architectures or [""])[0]).endswith(_WITH_HEAD)


def order_labels(labels: Labels, folder: Path) -> Labels:
    """Return ``labels`` in the order of a model's outputs, where it names the same classes."""
    return order_as(labels, read_config(folder))


def order_as(labels: Labels, config: Any) -> Labels:
    """As :func:`order_labels`, of a model's configuration."""
    return labels.ordered_as(config.id2label[place] for place in sorted(config.id2label))


def load_classifier(folder: Path, labels: Labels, seed: int) -> Any:
    """Read a model, with a head for ``labels``.

    A head of that width is kept, so the order should be its own (:func:`order_labels`); any other
    is made anew, from ``seed``, which also seeds torch.

    Args:
        folder: in Hugging Face's format. The encoder of any sequence classifier will do.
        labels: what the head says.
        seed: of a new head, and of the dropout that follows.

    Raises:
        ValueError: the folder holds no such model, or nothing says which token pads.
    """
    transformers = import_transformers()
    torch.manual_seed(seed)
    try:
        model = read_pretrained(
            transformers.AutoModelForSequenceClassification,
            folder,
            new_head=True,
            dtype=torch.float32,
            **_settings_of(labels),
        )
        _name_padding(model.config, folder)
        return model
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no sequence classifier can be read: {error}") from error


def _settings_of(labels: Labels) -> dict[str, Any]:
    """Settings of a classifier's configuration."""
    settings: dict[str, Any] = {"num_labels": labels.num_outputs}
    if labels.classes is None:
        settings["problem_type"] = "regression"
    else:
        settings["problem_type"] = "single_label_classification"
        settings["id2label"] = dict(enumerate(labels.classes))
        settings["label2id"] = {name: place for place, name in enumerate(labels.classes)}
    return settings


def load_teacher(folder: Path, labels: Labels) -> Any:
    """Read a classifier that was trained already, compressed as it may be.

    Raises:
        ValueError: the folder holds none, or one with other labels.
    """
    from dqrm.compress.grids.records_file import load_records

    model = load_any(folder)
    require_head(model.config, str(folder))
    require_same_labels(model.config, labels, str(folder))
    load_records(folder, model)
    return model


def require_head(config: Any, where: str) -> None:
    """Refuse a model that is no classifier.

    Raises:
        ValueError: it is none; ``where`` begins the message.
    """
    if not has_head(config):
        kind = (config.architectures or ["a model"])[0]
        raise ValueError(f"{where}: {kind} has no head; fine-tune it first")


def require_same_labels(config: Any, labels: Labels, where: str) -> None:
    """Hold the outputs of a trained classifier against the labels of the data.

    Names that are not those of the data, as LABEL_0, tell nothing.

    Args:
        config: of the classifier.
        labels: of the data.
        where: begins the message.

    Raises:
        ValueError: there are more or fewer outputs, or they are the same labels in another order.
    """
    if config.num_labels != labels.num_outputs:
        what = " (a regression)" if labels.classes is None else ""
        raise ValueError(
            f"{where}: it has {config.num_labels} outputs, and the data {labels.num_outputs}{what}"
        )
    wanted = [name.casefold() for name in labels.classes or ()]
    named = [str(config.id2label[output]).casefold() for output in range(len(wanted))]
    if named != wanted and sorted(named) == sorted(wanted):
        raise ValueError(
            f"{where}: its outputs are in another order than the labels of the data "
            f"({', '.join(named)}, not {', '.join(wanted)}); fine-tune it on this data first"
        )


def require_same_tokens(folder: Path, teacher: Path) -> None:
    """Hold the tokenizers of two models equal.

    Raises:
        ValueError: a token has another number.
    """
    if load_tokenizer(folder).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise ValueError(f"{teacher}: a teacher must have the tokenizer of {folder}")


def load_any(folder: Path) -> Any:
    """Read the model of a folder as what it was saved as; without a head where it has none.

    Raises:
        ValueError: the folder holds no model that transformers knows, or one with a head and
            nothing says which token pads.
    """
    transformers = import_transformers()
    try:
        if not has_head(read_config(folder)):
            return read_pretrained(
                transformers.AutoModel, folder, new_head=True, dtype=torch.float32
            )
        auto = transformers.AutoModelForSequenceClassification
        model = read_pretrained(auto, folder, new_head=False, dtype=torch.float32)
        _name_padding(model.config, folder)
        return model
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no transformer can be read: {error}") from error


def load_skeleton(folder: Path) -> Any:
    """Return the classifier of a model's folder without values, on the meta device.

    Its head is that of the folder's configuration; transformers says 2 classes where it has none.

    Raises:
        ValueError: the folder holds no model that transformers knows, or nothing says which token
            pads.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        _name_padding(config, folder)
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        restore_shapes(model)
        return model
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no sequence classifier can be read: {error}") from error


def check_weights(folder: Path, *, new_head: bool) -> None:
    """Look in the headers of a model's weights for what they lack; read them where they seem to.

    Args:
        folder: in Hugging Face's format.
        new_head: a head or a pooler need not be there; nor need they where it is no classifier's.

    Raises:
        ValueError: they are not all there.
    """
    skeleton, there = load_skeleton(folder), set[str]()
    require_whole(folder)
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            there |= {*file.keys()}
    encoder = f"{skeleton.base_model_prefix}."
    wanted = {name.removeprefix(encoder) for name, _ in skeleton.named_parameters()}
    new_head = new_head or not has_head(skeleton.config)
    if new_head:
        head = {name for name, _ in skeleton.named_parameters() if not name.startswith(encoder)}
        wanted = {name for name in wanted - head if not name.startswith("pooler.")}
    # Older files call some by other names, which transformers knows.
    if not wanted <= {name.removeprefix(encoder) for name in there}:
        auto = import_transformers().AutoModelForSequenceClassification
        try:
            read_pretrained(auto, folder, new_head=new_head, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no sequence classifier can be read: {error}") from error


def _name_padding(config: Any, folder: Path) -> None:
    """Have a configuration say which token pads, where only the tokenizer does.

    Classifiers on decoders look for the last token that does not pad.
    """
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = load_tokenizer(folder).pad_token_id
        if config.pad_token_id is None:
            raise ValueError("no token pads; name one in tokenizer_config.json, as pad_token")


def save_classifier(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer in Hugging Face's format, weights as safetensors."""
    record_shapes(model)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, and faster than float32 ones.

    Intel's have AVX-512 instructions for it even where AMX is missing or hidden by a virtual
    machine; products take 1.9 times as long with those as in float32.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("amx_bf16") or capabilities.get("bf16"):
        return True
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return bool(capabilities.get("avx512_bf16")) and not intel


@torch.no_grad()
def predict_text(
    model: Any,
    text: EncodedText,
    batch_size: int,
    *,
    bf16: bool = False,
    world: World | None = None,
) -> Tensor:
    """Return the logits, float32 [rows, outputs], in the order of the table.

    The model is put into evaluation mode for the time and back afterwards.

    Args:
        model: with a head.
        text: to predict from.
        batch_size: sentences at a time.
        bf16: multiply matrices in bf16.
        world: of processes that have the same model; all call this and share the batches.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    logits = torch.zeros(len(text), model.config.num_labels)
    try:
        for rows in islice(text.in_order_of_length(batch_size), world.rank, None, world.size):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits[rows] = model(**text.batch(rows)).logits.float()
    finally:
        model.train(was_training)
    # Those of other ranks' rows are 0 here.
    return world.sum_(logits)
