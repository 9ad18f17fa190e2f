"""The YAML file of a pipeline.

    name: clicks
    stages:
      - {stage: train, config: census}
      - {stage: report}

Overrides name a stage by its name: ``stages.train.settings.quant.bits=8``.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from dqrm.configuration import ConfigError, load
from dqrm.pipelines.stages import TEXT_STAGES, TEXT_TRAINING_STAGES, AnyStage
from dqrm.pipelines.stages.text_data import TextData
from dqrm.pipelines.stages.text_exchange import TextExchange
from dqrm.settings import Settings
from dqrm.tracking.config import TrackingConfig
from dqrm.yaml_text import Document, parse_document

_SHIPPED = Path(__file__).parent / "recipes"

_POSITION = re.compile(r"\bstages\.(\d+)\b")
_PART_OF_SHARED = re.compile(r"stages\.(\d+)\.(data|exchange)\.")


class PipelineConfig(Settings):
    """Everything that decides what a pipeline does."""

    name: str | None = None
    """Name of the pipeline and of its folder; that of the file when not given."""

    output: Path = Path("runs")
    """Folder under which the pipeline's own folder is made."""

    threads: PositiveInt | None = None
    """Threads to compute with; None takes the cores that are free for this process."""

    tracking: TrackingConfig = TrackingConfig()

    data: TextData | None = None
    """Labelled sentences of the stages that need some and name none themselves."""

    exchange: TextExchange | None = None
    """What processes that train a text model together send each other, in stages that do not say
    so themselves."""

    stages: tuple[AnyStage, ...] = Field(min_length=1)
    """What to run, in order."""

    @model_validator(mode="before")
    @classmethod
    def _share(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list | tuple):
            return tree

        def completed(stage: Any) -> Any:
            if not isinstance(stage, dict):
                return stage
            shared = {
                name: tree[name]
                for name, kinds in (("data", TEXT_STAGES), ("exchange", TEXT_TRAINING_STAGES))
                if tree.get(name) is not None and stage.get("stage") in kinds
            }
            return {**shared, **stage}

        return {**tree, "stages": [completed(stage) for stage in tree["stages"]]}

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: tuple[AnyStage, ...]) -> tuple[AnyStage, ...]:
        keys = [stage.key for stage in stages]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two stages are called {key}; give one of them a name")
        return stages

    @property
    def folder(self) -> Path:
        """The pipeline's folder."""
        return self.output / (self.name or "pipeline")


def shipped_recipes() -> dict[str, str]:
    """Names of the shipped pipelines, each with what its file says it is for.

    A file opens with the command that runs it and an empty comment; the line after says it.
    """
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[2].removeprefix("# ")
        for path in sorted(_SHIPPED.glob("*.yaml"))
    }


def find_pipeline(source: str) -> Path:
    """The file that ``source`` names: its path, or the name of a shipped one.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(source)
    shipped = _SHIPPED / f"{source}.yaml"
    if path.suffix or path.is_file():
        return path
    if source in shipped_recipes():
        return shipped
    raise FileNotFoundError(
        f"{source}: no such file or shipped pipeline; shipped are: {', '.join(shipped_recipes())}"
    )


def load_pipeline(file: Path, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read a pipeline's file and put the overrides over it.

    Raises:
        ConfigError: for every fault of file and overrides, all in one message.
        FileNotFoundError: there is no such file.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8 text") from error
    tree = parse_document(text, str(file)).tree
    names = _stage_names(tree)
    given = [_by_position(override, names) for override in overrides]
    _refuse_parts_of_shared(tree, given, names)
    try:
        config = load(PipelineConfig, file, given)
    except ConfigError as error:
        raise ConfigError(_POSITION.sub(lambda found: _named(found, names), str(error))) from error
    return config if config.name else config.model_copy(update={"name": file.stem})


def stage_lines(file: Path) -> Document:
    """The file with the line of each key, for messages about what it says."""
    return parse_document(file.read_text(encoding="utf-8-sig"), str(file))


def _stage_names(tree: dict[str, Any]) -> list[str]:
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return []
    return [str(s.get("name") or s.get("stage")) if isinstance(s, dict) else "" for s in stages]


def _named(found: re.Match[str], names: list[str]) -> str:
    """``stages.finetune`` for ``stages.0``, where names tell stages apart."""
    position = int(found[1])
    name = names[position] if position < len(names) else ""
    return f"stages.{name}" if names.count(name) == 1 and name else found[0]


def _refuse_parts_of_shared(tree: dict[str, Any], given: list[str], names: list[str]) -> None:
    """A part of ``data`` that is set for a stage would be all the data that the stage has."""
    stages = tree.get("stages")
    for override in given:
        match = _PART_OF_SHARED.match(override)
        if match is None or not isinstance(stages, list) or int(match[1]) >= len(stages):
            continue
        section, stage = match[2], stages[int(match[1])]
        shared = tree.get(section) or any(o.startswith(f"{section}.") for o in given)
        own = any(o.startswith(f"stages.{match[1]}.{section}=") for o in given)
        if shared and not own and isinstance(stage, dict) and stage.get(section) is None:
            key = override.partition("=")[0]
            told = _POSITION.sub(lambda found: _named(found, names), key)
            part = key.split(".", 3)[3]
            raise ConfigError(
                f"{told}: {section} is that of the whole pipeline; set {section}.{part}, or give "
                f"the stage its own {section} in the file"
            )


def _by_position(override: str, names: list[str]) -> str:
    """``stages.train.config=x`` as ``stages.0.config=x``; anything else unchanged."""
    key, equals, value = override.partition("=")
    head, *rest = key.split(".")
    if head != "stages" or not rest or rest[0].isdecimal():
        return override
    if rest[0] not in names:
        known = ", ".join(name for name in names if name)
        raise ConfigError(f"{override}: there is no stage {rest[0]}; there are: {known}")
    return ".".join([head, str(names.index(rest[0])), *rest[1:]]) + equals + value
