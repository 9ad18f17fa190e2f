"""Ways to get a model, as changes of one base configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dqrm.config import RunConfig
from dqrm.configuration import ConfigError

Settings = Mapping[str, Mapping[str, Any]]
"""By section of the configuration and key."""

TUNED = "tuned"
"""Key of the arm that is the best of its candidates on validation."""


@dataclass(frozen=True)
class Arm:
    """One way to get a model."""

    key: str
    """Short and unique in a study; begins the names of its runs."""
    title: str
    settings: Settings = field(default_factory=dict)
    """What differs from the base configuration."""
    after: str | None = None
    """Key of the arm whose selected model is put on this one's grid, without training."""
    candidate: bool = False
    """Stands for the tuned rival if it is the best of the candidates on validation."""
    shown: bool = True
    """Whether it has a line of its own in the report."""
    recipe: Settings = field(default_factory=dict)
    """What a candidate changes besides training in full precision."""
    processes: int = 1
    module: str = "dqrm"
    """What trains: the command line, or a worker of a published method."""
    arguments: tuple[str, ...] = ()
    """More arguments of that worker."""


def configure(base: RunConfig, arm: Arm, seed: int) -> RunConfig:
    """Return the configuration of a run of ``arm``.

    Raises:
        ConfigError: the base and the arm do not go together.
    """
    tree = base.model_dump(by_alias=True)
    for section, values in arm.settings.items():
        tree[section] = {**tree[section], **values}
    tree["train"] = {**tree["train"], "seed": seed}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"the arm {arm.title!r} of this configuration: {reason}") from error


def quantized(
    bits: int, *, mlp_bits: int = 4, granularity: str = "table", storage: str = "fp32", **more: Any
) -> Settings:
    """Settings of training at ``bits``; whatever the base says of widths and scales is replaced."""
    return {
        "quant": {
            "bits": bits,
            "mlp_bits": mlp_bits,
            "table_bits": {},
            "granularity": granularity,
            "scale_period": 0,
            "storage": storage,
            "ste": "pass",
            **more,
        }
    }


FULL: Settings = {
    **quantized(32, mlp_bits=32, activation_bits=32),
    "train": {"precision": "fp32"},
}
"""Settings of training in full precision."""


def merged(*several: Settings) -> Settings:
    """Return settings with later ones over earlier ones."""
    tree: dict[str, dict[str, Any]] = {}
    for settings in several:
        for section, values in settings.items():
            tree[section] = {**tree.get(section, {}), **values}
    return tree
