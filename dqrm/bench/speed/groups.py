"""What can be compared: for each group the tables, the contestants and the work of one call."""

from collections.abc import Callable
from dataclasses import dataclass

from dqrm.bench.speed.contestants import Entry
from dqrm.bench.speed.dense import interaction_entries, mlp_entries, mlp_flops
from dqrm.bench.speed.embedding import embedding_entries
from dqrm.bench.speed.packed import packed_entries
from dqrm.bench.speed.step import step_entries
from dqrm.bench.speed.traffic import Shape, Traffic, kaggle_shape, largest_table_shape
from dqrm.data.synth import CRITEO_KAGGLE_CARDINALITIES

Tables = Callable[[int, float, int | None], Shape]


def _lookups(traffic: Traffic) -> float:
    return traffic.lookups


def _samples(traffic: Traffic) -> float:
    return traffic.batch


@dataclass(frozen=True)
class Group:
    """A piece of work that several contestants can do."""

    name: str
    title: str
    entries: Callable[[Shape], list[Entry]]
    unit: str
    work: Callable[[Traffic], float] = _lookups
    """Units of one call."""
    tables: Tables = kaggle_shape
    bags: int = 1
    """Bags of each table for one sample."""
    skewed: bool = True
    """Whether it matters which ids are looked up."""
    row_passes: int = 0
    """Times a looked-up row's bytes move between memory and processor; 0 gives no GB/s."""


def _mlp_work(traffic: Traffic) -> float:
    return mlp_flops(traffic.shape, traffic.batch)


KERNELS = (
    Group(
        "forward",
        "embedding forward",
        lambda shape: embedding_entries(shape, "none"),
        "look-ups",
        row_passes=1,
    ),
    Group(
        "sgd",
        "embedding forward + backward + SGD",
        lambda shape: embedding_entries(shape, "sgd"),
        "look-ups",
        row_passes=3,
    ),
    Group(
        "adagrad",
        "embedding forward + backward + row-wise Adagrad",
        lambda shape: embedding_entries(shape, "adagrad"),
        "look-ups",
        row_passes=3,
    ),
    Group(
        "adam",
        "embedding forward + backward + Adam of touched rows",
        lambda shape: embedding_entries(shape, "adam"),
        "look-ups",
        row_passes=7,
    ),
    Group("packed", "packed INT4 look-up", packed_entries, "look-ups", row_passes=1),
    Group(
        "packed-one-table",
        "packed INT4 look-up, 26 ids a sample of the largest table",
        packed_entries,
        "look-ups",
        tables=largest_table_shape,
        bags=len(CRITEO_KAGGLE_CARDINALITIES),
        row_passes=1,
    ),
    Group(
        "interaction",
        "dot interaction forward + backward",
        interaction_entries,
        "samples",
        work=_samples,
        skewed=False,
    ),
    Group(
        "mlp",
        "both MLPs forward + backward",
        mlp_entries,
        "FLOP",
        work=_mlp_work,
        skewed=False,
    ),
)

TRAIN = Group("train", "whole training step", step_entries, "samples", work=_samples)
