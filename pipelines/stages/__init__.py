"""The stages there are. A new one is a module here and a name in the union."""

from typing import Annotated, get_args

from pydantic import Field

from dqrm.pipelines.stages.allocate import AllocateStage
from dqrm.pipelines.stages.compress import CompressStage
from dqrm.pipelines.stages.finetune import FinetuneStage
from dqrm.pipelines.stages.lower import LowerStage
from dqrm.pipelines.stages.prepare import PrepareStage
from dqrm.pipelines.stages.promote import PromoteStage
from dqrm.pipelines.stages.prune import PruneStage
from dqrm.pipelines.stages.reconstruct import ReconstructStage
from dqrm.pipelines.stages.report import ReportStage
from dqrm.pipelines.stages.table_bits import TableBitsStage
from dqrm.pipelines.stages.text_data import TextData
from dqrm.pipelines.stages.text_exchange import TextExchange
from dqrm.pipelines.stages.train import TrainStage

AnyStage = Annotated[
    FinetuneStage
    | PruneStage
    | AllocateStage
    | CompressStage
    | ReconstructStage
    | LowerStage
    | PrepareStage
    | TrainStage
    | TableBitsStage
    | PromoteStage
    | ReportStage,
    Field(discriminator="stage"),
]


def _with_field(name: str, annotation: type) -> frozenset[str]:
    return frozenset(
        kind.model_fields["stage"].default
        for kind in get_args(get_args(AnyStage)[0])
        if getattr(kind.model_fields.get(name), "annotation", None) is annotation
    )


TEXT_STAGES = _with_field("data", TextData)
"""Kinds of those that take labelled sentences."""

TEXT_TRAINING_STAGES = _with_field("exchange", TextExchange)
"""Kinds of those that train a text model, in several processes if there are any."""
