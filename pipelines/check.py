"""Faults of a pipeline that show before it runs."""

from pathlib import Path

from dqrm.configuration import ConfigError
from dqrm.pipelines.config import PipelineConfig, stage_lines
from dqrm.pipelines.stage import Problem, Stage
from dqrm.yaml_text import Path as KeyPath


def check_pipeline(config: PipelineConfig, file: Path) -> None:
    """Look for what would keep a stage from running.

    Raises:
        ConfigError: naming file, line, stage and field of every fault found.
    """
    lines = stage_lines(file).lines
    faults = []
    earlier: dict[str, Stage] = {}
    for position, stage in enumerate(config.stages):
        for problem in _problems(stage, dict(earlier)):
            place: KeyPath = ("stages", position, *problem.field.split("."))
            line = next(lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines)
            field = f".{problem.field}" if problem.field else ""
            faults.append(f"{file}:{line}: stages.{stage.key}{field}: {problem.message}")
        earlier[stage.key] = stage
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"{len(faults)} faults in the pipeline:{listed}")


def _problems(stage: Stage, earlier: dict[str, Stage]) -> list[Problem]:
    found = []
    try:
        stage.inputs(earlier)
    except ValueError as error:
        found.append(Problem("", str(error)))
    try:
        found += stage.problems(earlier)
    except (OSError, ValueError) as error:
        # Of a kind the stage did not foresee; those of other stages are told all the same.
        found.append(Problem("", str(error)))
    return found
