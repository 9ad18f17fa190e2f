"""What ``dqrm bench accuracy`` and ``dqrm bench replicas`` share: a study without its report."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from dqrm.config import RunConfig
    from dqrm.study.kinds import Builder
    from dqrm.study.outcome import Outcome
    from dqrm.study.study import Study
    from dqrm.study.verdict import Metric


def compare(
    kind: str,
    ask: "Builder",
    config: "RunConfig",
    seeds: Sequence[int],
    json_file: Path | None,
    processes: int = 1,
) -> "Study":
    """Run all arms with all seeds in ``<output>/study``, as `dqrm study` does.

    Args:
        kind: name of the comparison.
        ask: makes the question.
        config: the recipe.
        seeds: one run of each arm for each.
        json_file: is given everything measured.
        processes: of arms that train in several.
    """
    from dqrm.data.files import write_json
    from dqrm.runtime import choose_threads
    from dqrm.study.plan import make_plan
    from dqrm.study.study import Conductor
    from dqrm.tracking.environment import environment_tags

    output = config.output.absolute() / "study"
    plan = make_plan(
        kind, ask, [("", config)], seeds, output, Path(config.data.path).name, processes
    )
    threads = choose_threads(config.train.threads).count
    with ProgressDisplay() as display:
        study = Conductor(plan, 1, threads, config.tracking, display.show).run()
    if json_file is not None:
        (answered,) = study.answered
        record = {
            "environment": environment_tags(),
            "config": config.model_dump(mode="json"),
            "seeds": list(seeds),
            "failed": study.failed,
            "arms": [
                {"name": arm.title, "outcomes": [asdict(o) for o in answered.outcomes[arm.key]]}
                for arm in answered.arms
            ],
        }
        write_json(json_file, record)
    return study


def exit_code(study: "Study") -> int:
    """What the command that ran a study ends with."""
    if study.interrupted is not None:
        return 128 + study.interrupted
    return 1 if study.failed else 0


def test_figures(outcomes: "Sequence[Outcome]", metric: "Metric") -> tuple[str, str]:
    """Mean and standard deviation over seeds of a test metric, as text."""
    values = [outcome.test[metric] for outcome in outcomes]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f}", f"{spread:.4f}"
