"""The stages there are. A new one is a module here and a name in the union."""

from typing import Annotated

from pydantic import Field

from dqrm.pipelines.stages.compress import CompressStage
from dqrm.pipelines.stages.finetune import FinetuneStage
from dqrm.pipelines.stages.prune import PruneStage
from dqrm.pipelines.stages.report import ReportStage
from dqrm.pipelines.stages.train import TrainStage

AnyStage = Annotated[
    FinetuneStage | PruneStage | CompressStage | TrainStage | ReportStage,
    Field(discriminator="stage"),
]
