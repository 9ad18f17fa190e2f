"""What each study asks, of which arms, against which rival."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.study.arms import FULL, TUNED, Arm, Settings, merged, quantized

PUBLISHED_PERIOD = 200
"""Steps between refreshed scales (arXiv 2410.20046, table 1, Criteo Kaggle)."""

_DECAY = 1e-4


@dataclass(frozen=True)
class Question:
    """A claim, and what it takes to examine it on one data set."""

    name: str
    claim: str
    """As the paper or README has it."""
    arms: tuple[Arm, ...]
    ours: str
    """Key of the arm whose claim it is."""
    rival: str
    """Key of the arm all others are held against."""
    pictures: tuple[str, ...]
    """Names of dqrm.study.plots.PICTURES."""
    notes: tuple[str, ...] = ()


Builder = Callable[[RunConfig, PreparedDataset, int], Question]
"""Makes the question from the base configuration, the data set and a number of processes."""

_PLAIN = Arm("fp32", "FP32", FULL, candidate=True)
_FROM_FP32 = (
    Arm("fp32-int8", "FP32, then INT8 by row", quantized(8, mlp_bits=8, granularity="row"), "fp32"),
    Arm("fp32-int4", "FP32, then INT4 by row", quantized(4, granularity="row"), "fp32"),
)
_DQRM = Arm(
    "dqrm",
    f"DQRM as published (T={PUBLISHED_PERIOD})",
    quantized(4, scale_period=PUBLISHED_PERIOD),
)
_INT4 = Arm("int4", "INT4, exact scales", quantized(4))
_INT2 = Arm("int2", "INT2, exact scales", quantized(2))
_ROWS_8 = Arm("rows-int8", "INT8 rows, no master", quantized(8, granularity="row", storage="int8"))
_ROWS_4 = Arm("rows-int4", "INT4 rows, no master", quantized(4, granularity="row", storage="int4"))

_TUNED_NOTE = (
    "Tuned FP32 is the best of the candidates by mean validation over all seeds; tests of "
    "candidates without a line are not looked at. None of the low-bit arms is tuned, but for the "
    "one that takes over what was chosen for FP32."
)
_ONE_HOT_NOTE = (
    "DQRM as published quantizes pooled vectors; with one id a bag that is what quantizing rows "
    "gives. Biases stay FP32, which the published code clamps to the weights' grid."
)


def candidates(base: RunConfig, batches: int) -> tuple[Arm, ...]:
    """Return the settings among which FP32 is tuned: a small grid, each one change of the base.

    Args:
        base: whose rate is lowered.
        batches: of an epoch.
    """
    rate = base.optim.lr
    last = {"decay_start_step": 0, "decay_steps": batches}
    decay = {"weight_decay": _DECAY, "embedding_weight_decay": _DECAY}
    grid: list[tuple[str, str, Settings]] = [
        ("rate", f"rate {rate / 3:.3g}", {"optim": {"lr": rate / 3}}),
        ("dropout", "dropout 0.3", {"model": {"dropout": 0.3}}),
        ("one-epoch", "one epoch, falling rate", {"train": {"epochs": 1}, "optim": last}),
        (f"decay-{_DECAY:.0e}", f"weight decay {_DECAY:g}", {"optim": decay}),
    ]
    return tuple(
        Arm(
            f"fp32-{key}",
            f"FP32, {title}",
            merged(FULL, recipe),
            candidate=True,
            shown=False,
            recipe=recipe,
        )
        for key, title, recipe in grid
    )


def follow_up(chosen: Arm) -> Arm | None:
    """Return INT4 with the settings chosen for FP32; None where they are those of the base."""
    if not chosen.recipe:
        return None
    title = chosen.title.removeprefix("FP32, ")
    return Arm("int4-tuned", f"INT4, {title} too", merged(quantized(4), chosen.recipe))


def _overfit(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    tuned = candidates(base, _batches(base, dataset))
    return Question(
        "overfit",
        "FP32 peaks after an epoch or two and then learns rare ids by heart; at 4 bits that comes "
        "later and costs less (arXiv 2410.20046, tables 3 and 9).",
        (_PLAIN, *tuned, *_FROM_FP32, _DQRM, _INT4, _ROWS_8, _ROWS_4, _INT2),
        ours="int4",
        rival=TUNED,
        pictures=("curves", "seconds", "size"),
        notes=(_TUNED_NOTE, _ONE_HOT_NOTE),
    )


def _bits(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    tables = tuple(
        Arm(f"tables-int{bits}", f"INT{bits} tables, FP32 MLPs", quantized(bits, mlp_bits=32))
        for bits in (16, 8, 4, 2)
    )
    tuned = candidates(base, _batches(base, dataset))
    return Question(
        "bits",
        "Tables at 4 bits are as good as FP32 or better; 2 bits lose (arXiv 2410.20046, table 2).",
        (_PLAIN, *tuned, *_FROM_FP32, *tables, _DQRM, _INT4, _INT2),
        ours="int4",
        rival=TUNED,
        pictures=("size", "curves", "seconds"),
        notes=(_TUNED_NOTE, _ONE_HOT_NOTE),
    )


def _scale_period(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    epoch = _batches(base, dataset)
    periods = sorted({1, 10, 100, 1000, epoch})
    arms = [
        Arm(
            f"period-{period}",
            f"T={period}" + (" (an epoch)" if period == epoch else ""),
            quantized(4, scale_period=period),
        )
        for period in periods
    ]
    return Question(
        "scale-period",
        "A scale refreshed every T steps is as good as one of every step, and faster (arXiv "
        "2410.20046, table 5); exact scales without scans cost neither quality nor time.",
        (_INT4, *arms),
        ours="int4",
        rival="period-1",
        pictures=("step-time", "curves"),
    )


def exchange_arms(processes: int) -> tuple[Arm, ...]:
    """Return one process, and several by the codecs of their exchange."""
    several: list[tuple[str, str, dict[str, object]]] = [
        ("fp32", "FP32", {"rows": "fp32", "dense": "fp32"}),
        ("int8", "INT8 rows, INT8 MLPs", {"rows": "int8", "dense": "int8"}),
        ("int4", "INT4 rows, INT8 MLPs", {"rows": "int4", "dense": "int8"}),
        ("int4-sign", "INT4 rows, sign MLPs", {"rows": "int4", "dense": "sign"}),
        (
            "sign-open",
            "sign MLPs, no error feedback",
            {"rows": "int8", "dense": "sign", "error_feedback": False},
        ),
        (
            "int8-open",
            "INT8, no error feedback",
            {"rows": "int8", "dense": "int8", "error_feedback": False},
        ),
    ]
    return (
        Arm("alone", "1 process"),
        *(
            Arm(f"x-{key}", title, {"exchange": exchange}, processes=processes)
            for key, title, exchange in several
        ),
        Arm(
            "x-published",
            "published: clipped mean scales",
            processes=processes,
            module="dqrm.bench.published",
        ),
    )


def _exchange(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    return Question(
        "exchange",
        "Gradients of touched rows and MLPs travel as INT8 at little cost in quality (arXiv "
        "2410.20046, tables 4 and 6).",
        exchange_arms(processes),
        ours="x-int8",
        rival="x-fp32",
        pictures=("wire", "curves"),
        notes=(
            f"{processes} processes that share every batch; bytes are what a rank sends in a step, "
            "their ratio is to the same collectives in FP32. The published exchange travels in "
            "FP32 and is not counted.",
        ),
    )


def _memory(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    def stored(storage: str, bits: int, granularity: str = "table") -> Settings:
        return quantized(bits, mlp_bits=32, granularity=granularity, storage=storage)

    return Question(
        "memory",
        "Rows need no FP32 master copy in training: INT8 codes rounded stochastically are as good, "
        "in a quarter of the memory.",
        (
            Arm("fp32", "FP32 rows", merged(FULL)),
            Arm("tables-int4", "INT4 over FP32 rows", stored("fp32", 4)),
            Arm("rows-bf16", "BF16 rows", stored("bf16", 32)),
            Arm("codes-int8", "INT8 rows, no master", stored("int8", 8, "row")),
            Arm("codes-int4", "INT4 rows, no master", stored("int4", 4, "row")),
        ),
        ours="codes-int8",
        rival="fp32",
        pictures=("memory", "curves"),
        notes=(
            "MLPs stay FP32. Training bytes are weights, optimizer state and maxima by arithmetic; "
            "the peak is what the process held at most, libraries and data included.",
        ),
    )


def _multihot(base: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    full_tables = merged(quantized(32), {"quant": {"mlp_bits": 4}})
    return Question(
        "multihot",
        "Rows are to be quantized before they are pooled; the published code quantizes the pooled "
        "sum, which clamps it into the range of a single row.",
        (
            Arm("tables-fp32", "FP32 tables", full_tables),
            _INT4,
            Arm(
                "pooled",
                "pooled, then INT4 (published)",
                full_tables,
                module="dqrm.study.pooled_first",
            ),
            Arm("pooled-served", "the same, served from an INT4 table", quantized(4), "pooled"),
        ),
        ours="int4",
        rival="pooled",
        pictures=("bags", "curves"),
        notes=(
            "MLPs are INT4 in every arm. A packed table serves rows: what was trained with pooled "
            "sums on the grid is served by the last arm.",
        ),
    )


KINDS: dict[str, Builder] = {
    "overfit": _overfit,
    "bits": _bits,
    "scale-period": _scale_period,
    "exchange": _exchange,
    "memory": _memory,
    "multihot": _multihot,
}


def shown(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms with a line of their own."""
    return [arm for arm in arms if arm.shown]


def _batches(base: RunConfig, dataset: PreparedDataset) -> int:
    return dataset.split("train").num_batches(base.data.batch_size)
