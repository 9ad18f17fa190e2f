"""Stages that do next to nothing, can be killed at every point, and say how often they ran.

Run as a program: ``toy_stages.py FOLDER JSON``; the JSON holds the stages and where to die.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from dqrm.pipelines.config import PipelineConfig
from dqrm.pipelines.digests import file_digest
from dqrm.pipelines.folders import PipelineFolder
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.stage import Interrupted, Stage, StageContext
from dqrm.training.errors import TrainingError


class AddStage(Stage):
    """Adds a number to that of the stage it takes, one at a time."""

    stage: Literal["add"] = "add"
    add: int = 3
    takes: str | None = None
    file: Path | None = None
    die_at: int | None = None
    """Be killed after so many additions, once."""
    slow: bool = False
    diverges: bool = False
    tells_times: bool = False
    log: Path
    """Outside the pipeline: one line an attempt."""

    @property
    def shows_times(self):
        return self.tells_times

    def identity(self):
        return {"add": self.add}

    def sources(self):
        return {} if self.file is None else {"file": file_digest(self.file)}

    def inputs(self, earlier):
        if self.takes is None:
            return ()
        if self.takes not in earlier:
            raise ValueError(f"takes={self.takes}: there is none")
        return (self.takes,)

    def run(self, context: StageContext):
        total = sum(int((f / "total").read_text()) for f in context.inputs.values())
        saved = context.scratch / "saved"
        done = int(saved.read_text()) if saved.exists() else 0
        with self.log.open("a") as log:
            log.write(f"{self.key} from {done}\n")
        assert not list(context.output.iterdir()), "it starts empty"
        (context.output / "half").write_text("written before a kill")
        if self.diverges:
            raise TrainingError("the loss is nan at step 2; lower the lr")
        while done < self.add:
            if self.die_at == done:
                os.kill(os.getpid(), signal.SIGKILL)
            if context.stop() is not None:
                raise Interrupted(context.stop())
            done += 1
            saved.write_text(str(done))
            context.progress("adding", done, self.add, "ones")
            if self.slow:
                time.sleep(0.05)
        (context.output / "half").unlink()
        (context.output / "total").write_text(str(total + self.add))
        return {"total": float(total + self.add), "perf/ended": time.time()}


class ToyConfig(PipelineConfig):
    """A pipeline of them."""

    stages: tuple[AddStage, ...]


def die_before_publishing(key):
    """Be killed when a stage is finished and not yet visible."""
    publish = PipelineFolder.publish

    def kill(self, published, digest):
        if published == key:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, published, digest)

    PipelineFolder.publish = kill


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    if "unpublished" in given:
        die_before_publishing(given["unpublished"])
    config = ToyConfig.model_validate(
        {
            "name": "toy",
            "output": sys.argv[1],
            "tracking": {"enabled": False},
            "stages": given["stages"],
        }
    )
    try:
        result = run_pipeline(config, start=given.get("start"))
    except TrainingError as error:
        sys.exit(str(error))
    ran = [done.key for done in result.stages if done.ran]
    print(json.dumps({"ran": ran, "interrupted": result.interrupted}))
