"""A study with few arms on small data, also to be killed: python -m small_study DATA OUTPUT."""

import sys
from pathlib import Path

from dqrm.config import RunConfig
from dqrm.study.arms import FULL, TUNED, Arm, merged, quantized
from dqrm.study.kinds import Question
from dqrm.study.plan import make_plan
from dqrm.study.study import Conductor

RECIPE = {"optim": {"lr": 0.3}}
SEEDS = (0,)


def question(base, dataset, processes):
    return Question(
        "small",
        "Few arms.",
        (
            Arm("fp32", "FP32", FULL, candidate=True),
            # Much better than the base's rate, so that tuning has something to choose.
            Arm("fp32-fast", "FP32, fast", merged(FULL, RECIPE), None, True, False, RECIPE),
            Arm("fp32-int4", "FP32, then INT4 by row", quantized(4, granularity="row"), "fp32"),
            Arm("int4", "INT4", quantized(4)),
            Arm("broken", "INT4, broken", merged(quantized(4), {"optim": {"lr": 1e30}})),
        ),
        ours="int4",
        rival=TUNED,
        pictures=("curves", "seconds", "size"),
    )


def base(data, **tracking):
    return RunConfig.model_validate(
        {
            "data": {"path": str(data), "batch_size": 64},
            "model": {"embedding_dim": 4, "bottom_mlp": [8], "top_mlp": [8]},
            "optim": {"lr": 0.001},
            "train": {
                "epochs": 3,
                "max_steps": 160,
                "eval_every": 40,
                "log_every": 10,
                "threads": 1,
            },
            "checkpoint": {"every_steps": 10},
            "tracking": {"enabled": False, **tracking},
        }
    )


def run(data, output, seeds=SEEDS, jobs=1):
    plan = make_plan("small", question, [("", base(data))], seeds, Path(output), "clicks")
    said = []
    study = Conductor(plan, jobs, 1, plan.cases[0].base.tracking, lambda *a: said.append(a)).run()
    return study, said


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
