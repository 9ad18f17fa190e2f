"""``dqrm train --dry-run``: what a run would need, by arithmetic and by timing real steps."""

from dqrm.compress.grids import packed_row_bytes
from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.models.dlrm import table_bits
from dqrm.models.sizes import ModelSizes
from dqrm.runtime import available_memory_bytes, choose_threads
from dqrm.text import bytes_text, pairs, seconds_text, table
from dqrm.training import sharding
from dqrm.training.build import sizes_of
from dqrm.training.estimate import Timing, time_steps
from dqrm.training.ipex import check_ipex

_TABLES_SHOWN = 10


def describe(config: RunConfig, processes: int = 1) -> str:
    """Return sizes, memory, steps and the estimated time of a run.

    Args:
        config: of the run.
        processes: that would train together; the steps that are timed are those of a single one.
    """
    check_ipex(config)
    dataset = PreparedDataset.open(config.data.path)
    sizes = sizes_of(config, dataset)
    available = available_memory_bytes()
    batches = dataset.split("train").num_batches(config.data.batch_size)
    steps = batches * config.train.epochs
    steps = min(steps, config.train.max_steps or steps)
    threads = choose_threads(config.train.threads)
    fits = available is None or sizes.training_bytes < available
    timing = time_steps(config, dataset, steps) if fits else None
    rows = [
        ("data", f"{dataset.path} ({dataset.split('train').num_rows:,} training rows)"),
        ("tables", f"{len(dataset.tables)} with {sizes.embedding_rows:,} rows in all"),
        ("MLP parameters", f"{sizes.mlp_parameters:,}"),
        ("FP32 size", bytes_text(sizes.fp32_bytes)),
        ("packed size", bytes_text(sizes.packed_bytes)),
        ("steps", f"{steps:,} ({batches:,} an epoch)"),
        ("threads", f"{threads.count} ({threads.reason})"),
        ("memory needed", _memory_text(sizes, timing)),
        ("memory available", "unknown" if available is None else bytes_text(available)),
        ("time", _time_text(timing, steps)),
    ]
    if not fits:
        rows.append(("problem", "the model does not fit in memory"))
    text = f"{_largest_tables(config, dataset)}\n\n{pairs(rows)}"
    if processes > 1 and config.exchange.placement != "replicate":
        text += "\n\n" + "\n".join(_placement(config, dataset, sizes, processes))
    return text


def _placement(
    config: RunConfig, dataset: PreparedDataset, sizes: ModelSizes, processes: int
) -> list[str]:
    lines = sharding.describe(sharding.plan(config, dataset, processes), dataset, sizes)
    if config.exchange.placement == "auto":
        needed = bytes_text(sizes.training_bytes)
        lines.insert(0, f"unless every process has {needed} of memory for all tables:")
    return lines


def _memory_text(sizes: ModelSizes, timing: Timing | None) -> str:
    resident = f"{bytes_text(sizes.training_bytes)} for weights and optimizer"
    if timing is None:
        return resident
    return f"{bytes_text(timing.peak_bytes)} at the peak of the timed steps, {resident}"


def _time_text(timing: Timing | None, steps: int) -> str:
    if timing is None:
        return "unknown: no step was timed"
    total = seconds_text(timing.step_seconds * steps)
    return (
        f"about {total}, validations not counted: {1000 * timing.step_seconds:.1f} ms a step, "
        f"median of {timing.steps}"
    )


def _largest_tables(config: RunConfig, dataset: PreparedDataset) -> str:
    tables = dataset.tables
    bits = table_bits([info.name for info in tables], config.quant)
    dim = config.model.embedding_dim
    largest = sorted(zip(tables, bits, strict=True), key=lambda pair: -pair[0].num_rows)
    rows = [
        (
            info.name,
            f"{info.num_rows:,}",
            str(width),
            bytes_text(4 * info.num_rows * dim),
            bytes_text(info.num_rows * packed_row_bytes(dim, width)),
        )
        for info, width in largest[:_TABLES_SHOWN]
    ]
    text = table(("table", "rows", "bits", "FP32", "packed"), rows)
    hidden = len(largest) - _TABLES_SHOWN
    return f"{text}\n... and {hidden} smaller ones" if hidden > 0 else text
