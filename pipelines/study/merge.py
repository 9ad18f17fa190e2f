"""One pipeline of all recipes for a task and a seed: the model they begin with is trained once.

A stage is called as its recipe and itself, ``xtc-six``, so that a recipe more or less changes no
other. Behind every stage that compresses comes one that packs what it made and measures that, the
same way for all; those of the recipes are left out.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrm.compress.transforms.config import NMTransform, QuantTransform
from dqrm.compress.transforms.sparsify import count_search_steps
from dqrm.pipelines.config import PipelineConfig, find_pipeline, load_pipeline, shipped_recipes
from dqrm.pipelines.references import named_stage
from dqrm.pipelines.stage import Stage
from dqrm.pipelines.study.tasks import TASKS, Task

BASELINE = "finetune"
"""The stage that the recipes share."""

_SHIPPED_FOR = "sst2-"
_COMPRESSING = ("prune", "compress", "reconstruct")
_LEFT_OUT = ("lower", "report")
# Latency hardly depends on task and seed: many short measurements are as good as a long one.
_LATENCY = {"buckets": [[1, 64], [32, 64]], "seconds": 1.5}


@dataclass(frozen=True)
class Arm:
    """One way to compress."""

    label: str
    """Of its recipe and stage, for people."""
    key: str
    """Stage that makes the model."""
    lowered: str
    """Stage that packs it."""


@dataclass(frozen=True)
class StudySettings:
    """What the study runs."""

    data: Path
    """Folder of GLUE's files."""
    tasks: tuple[str, ...]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    """Folder of the pipelines' folders."""
    model: str | None = None
    """Encoder to begin with: a folder, or package:NAME; None takes the recipes'."""
    max_steps: int | None = None
    """No stage trains longer; schedules get as much shorter."""
    threads: int | None = None
    track: bool = True


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes that compress a transformer, without what they have in common."""
    return tuple(
        name.removeprefix(_SHIPPED_FOR)
        for name in shipped_recipes()
        if name.startswith(_SHIPPED_FOR)
    )


def merged_pipeline(
    settings: StudySettings, task: str, seed: int
) -> tuple[PipelineConfig, list[Arm]]:
    """Return the pipeline of a task and a seed, and what it compares with its baseline.

    Raises:
        ValueError: recipes begin with different models, or there are too few steps for a schedule.
        FileNotFoundError: a file of the task is not there.
    """
    data = TASKS[task].data(task, settings.data)
    baseline: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    arms: list[Arm] = []
    for recipe in settings.recipes:
        first, *others = load_pipeline(find_pipeline(_SHIPPED_FOR + recipe)).stages
        begin = _adapted(first, TASKS[task], settings) | {"data": data, "seed": seed}
        if baseline and begin != baseline:
            raise ValueError(
                f"{recipe} fine-tunes otherwise than {settings.recipes[0]}: they cannot share a "
                "model to begin with"
            )
        baseline = begin
        names = {first.key: BASELINE} | {stage.key: _name(recipe, stage.key) for stage in others}
        made = []
        for stage in others:
            if stage.stage in _LEFT_OUT:
                continue
            tree = _renamed(_adapted(stage, TASKS[task], settings), names)
            tree |= {"name": names[stage.key], "data": data}
            tree |= {"seed": seed} if "seed" in type(stage).model_fields else {}
            made.append(tree)
        made, compressed = _with_packing(made, names, TASKS[task], data)
        stages += made
        arms += compressed
    if settings.model is not None:
        baseline["model"] = settings.model
    config = PipelineConfig.model_validate(
        {
            "name": f"{task}-{seed}",
            "output": settings.output,
            "threads": settings.threads,
            "tracking": {"enabled": settings.track},
            "stages": [baseline | {"name": BASELINE}, *stages],
        }
    )
    return config, arms


def _name(recipe: str, key: str) -> str:
    return key if key == recipe else f"{recipe}-{key}"


def _adapted(stage: Stage, task: Task, settings: StudySettings) -> dict[str, Any]:
    """Settings of a recipe's stage, for the task."""
    tree = stage.model_dump(mode="json", by_alias=True, exclude_unset=True)
    fields = type(stage).model_fields
    if "max_length" in fields:
        tree["max_length"] = task.max_length
    if "select_by" in fields:
        tree["select_by"] = task.metric
    if "epochs" in fields:
        epochs = task.finetune_epochs if stage.stage == "finetune" else task.compress_epochs
        tree |= {} if epochs is None else {"epochs": epochs}
    if task.compress_steps is not None and tree.get("max_steps") is not None:
        _shorten(tree, fields, task.compress_steps)
    if settings.max_steps is None:
        return tree
    for most in itertools.count(settings.max_steps):
        shorter = copy.deepcopy(tree)
        _shorten(shorter, fields, most)
        if _has_time(shorter, most):
            break
    if most > settings.max_steps:
        raise ValueError(
            f"--max-steps {settings.max_steps}: too few for the schedule of {stage.key}; "
            f"give {most} or more"
        )
    return shorter


def _shorten(tree: dict[str, Any], fields: Any, most: int) -> None:
    """Have a stage take ``most`` steps at most, and its transforms that much less time."""
    if "steps" in fields and tree.get("solver") == "lkd":
        tree["steps"] = min(most, tree.get("steps", fields["steps"].default))
    if "max_steps" not in fields:
        return
    whole = tree.get("max_steps")
    tree["max_steps"] = min(most, whole or most)
    if whole is None or whole <= most:
        return
    for transform in tree.get("transforms", ()):
        schedule = transform.get("schedule") or {}
        if "period" in schedule:
            schedule["period"] = max(1, schedule["period"] * most // whole)
        if "offset" in schedule:
            schedule["offset"] = schedule["offset"] * most // whole
        if transform["kind"] == "nm" and transform.get("via", "admm") != "one_shot":
            _shorten_search(transform, most, whole)


def _shorten_search(transform: dict[str, Any], steps: int, whole: int) -> None:
    """Have a mask searched for in ``steps`` where it was in ``whole``.

    How long weights take to recover from the cut depends little on how long they were trained
    before it, so the search gives up more of the steps than the recovery. On STS-B with 200 steps
    for 800, ADMM was behind the one-shot mask by 0.9 points of Pearson's correlation (dev rows, one
    seed) with half of the steps before the cut, and by 0.2 with a fifth.
    """
    masks = NMTransform.model_validate(transform)
    # At least a step of it, where there are two.
    share = max((1 - masks.polish) * math.sqrt(steps / whole), 1 / (steps + 1))
    transform["polish"] = round(1 - share, 4)
    if masks.via == "admm":
        search = count_search_steps(steps, transform["polish"])
        transform["updates"] = max(1, min(masks.updates * steps // whole, search))


def _has_time(tree: dict[str, Any], steps: int) -> bool:
    """Whether bits can go down, and ADMM make its updates, in so many steps."""
    for transform in tree.get("transforms", ()):
        if transform["kind"] == "quant":
            bits = QuantTransform.model_validate(transform).bits()
            if bits is not None and bits.last_transition() >= steps:
                return False
        if transform["kind"] == "nm":
            masks = NMTransform.model_validate(transform)
            if masks.via == "admm" and count_search_steps(steps, masks.polish) < masks.updates:
                return False
    return True


def _with_packing(
    stages: list[dict[str, Any]], names: dict[str, str], task: Task, data: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[Arm]]:
    """Put one that packs behind every stage that compresses; return all, and what they compress."""
    own = {after: before for before, after in names.items()}
    all_stages, arms = [], []
    for stage in stages:
        all_stages.append(stage)
        if stage["stage"] not in _COMPRESSING:
            continue
        key = stage["name"]
        on_grids = stage.get("transforms") or stage.get("allocation")
        all_stages.append(
            {
                "stage": "lower",
                "name": f"{key}-lowered",
                "model": f"stage:{key}",
                "compare": f"stage:{BASELINE}",
                # What runs shall compute what was trained, wherever the study is run.
                "target": "int8" if on_grids else "fp32",
                "max_length": task.max_length,
                "data": data,
                **_LATENCY,
            }
        )
        label = key if own[key] == key else f"{key.removesuffix(f'-{own[key]}')} {own[key]}"
        arms.append(Arm(label, key, f"{key}-lowered"))
    return all_stages, arms


def _renamed(tree: Any, names: dict[str, str]) -> Any:
    """A stage's settings with the names of stages they mention replaced."""
    if isinstance(tree, dict):
        return {key: _renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, names) for value in tree]
    named = named_stage(tree) if isinstance(tree, str) else None
    return tree if named is None else f"stage:{names.get(named, named)}"
