"""What is searched: ranges and choices of configuration values.

    optim.lr=log:1e-3..1e-1              a range, searched by its logarithm
    model.dropout=0..0.5                 a range; of whole numbers where the key takes those
    quant.bits=4,8                       choices
    model.top_mlp=[64],[128,64]          choices that are lists

Any other ``key=value`` is fixed for all trials.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.yaml_text import ConfigError, dump_value

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<log>log:)?(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})")
_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "\"'"

_FIXED = {
    "name": "each trial has a name of its own",
    "output": "each trial has a folder of its own",
    "tracking": "it says where runs are recorded",
    "checkpoint": "it does not change what is learned",
    "exchange": "a trial trains in one process",
    "data.path": "trials are compared on the same validation rows",
    "train.seed": "the best of several seeds is luck; give one, and train the winner with others",
    "train.select": "it is the measure that trials are compared by",
    "train.threads": "it does not change what is learned",
    "train.log_every": "it does not change what is learned",
    "train.eval_batch_size": "it does not change what is learned",
}
"""Keys, or sections of them, that are not searched, and why."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    key: str
    low: str
    high: str
    log: bool
    """Whether the logarithm is searched."""

    @property
    def text(self) -> str:
        """As it is written behind the key."""
        return f"{'log:' if self.log else ''}{self.low}..{self.high}"

    @property
    def samples(self) -> tuple[str, ...]:
        """Values that stand for all in a check."""
        return self.low, self.high


@dataclass(frozen=True)
class Choices:
    """A few values, each as it is written behind the key."""

    key: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is written behind the key."""
        return ",".join(self.values)

    @property
    def samples(self) -> tuple[str, ...]:
        """All of them."""
        return self.values


@dataclass(frozen=True)
class Space:
    """What is searched, by key; ``whole`` names the ranges of whole numbers."""

    searches: dict[str, Range | Choices]
    whole: frozenset[str]


def split_arguments(arguments: Iterable[str]) -> tuple[dict[str, Range | Choices], list[str]]:
    """Part what is searched from what is fixed.

    Raises ConfigError for a range or choices that make no sense.
    """
    searches: dict[str, Range | Choices] = {}
    fixed = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        search = _parse(key.strip(), text.strip())
        if search is None:
            fixed.append(argument)
        elif key in searches:
            raise ConfigError(f"{key} is given twice: {searches[key].text} and {text}")
        else:
            searches[key] = search
    return searches, fixed


def check_space(
    searches: Mapping[str, Range | Choices], source: str | None, fixed: Sequence[str]
) -> tuple[RunConfig, Space]:
    """Check every bound and choice against the configuration, and return both.

    Args:
        searches: by key.
        source: configuration file or shipped name under all trials.
        fixed: overrides of all trials. A value is checked with these and the other keys as there.

    Raises:
        ConfigError: for every fault, in one message that names key, value and what is allowed.
    """
    base = load(RunConfig, source, fixed)
    if not searches:
        raise ConfigError(
            "nothing to search: give a range, optim.lr=log:1e-3..1e-1, or choices, quant.bits=4,8"
        )
    given = {argument.partition("=")[0] for argument in fixed}
    faults: list[str] = []
    whole = set()
    for key, search in searches.items():
        reason = next((why for k, why in _FIXED.items() if f"{key}.".startswith(f"{k}.")), None)
        if reason is not None:
            faults.append(f"{key}={search.text}: is not searched, as {reason}")
            continue
        if key in given:
            faults.append(f"{key}={search.text}: is fixed as well; leave one out")
            continue
        values, found = [], []
        for text in search.samples:
            try:
                values.append(_value_at(load(RunConfig, source, [*fixed, f"{key}={text}"]), key))
            except ConfigError as error:
                found.append(str(error))
        faults += dict.fromkeys(found)
        if found or not isinstance(search, Range):
            continue
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            faults.append(f"{key}={search.text}: takes no numbers; give choices, {key}=A,B")
        elif all(isinstance(value, int) for value in values):
            whole.add(key)
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"{len(faults)} faults in what is searched:{listed}")
    return base, Space(dict(searches), frozenset(whole))


def override(key: str, value: object) -> str:
    """``key=value`` of a value that was drawn; choices are texts already."""
    return f"{key}={value if isinstance(value, str) else dump_value(value)}"


def _parse(key: str, text: str) -> Range | Choices | None:
    match = _RANGE.fullmatch(text)
    if match is not None:
        search = Range(key, match["low"], match["high"], bool(match["log"]))
        if float(search.low) >= float(search.high):
            raise ConfigError(f"{key}={text}: the range is empty; write the smaller number first")
        if search.log and float(search.low) <= 0:
            raise ConfigError(
                f"{key}={text}: log: needs numbers above 0; leave it out, or begin there"
            )
        return search
    if text.startswith("log:"):
        raise ConfigError(f"{key}={text}: log: stands before a range, such as log:1e-3..1e-1")
    values = _split(text)
    if len(values) == 1:
        return None
    if not all(values):
        raise ConfigError(f"{key}={text}: a choice is empty; write such as {key}=A,B")
    if len(set(values)) < len(values):
        raise ConfigError(f"{key}={text}: a choice is given twice")
    return Choices(key, tuple(values))


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPEN + _CLOSE:
            depth += 1 if letter in _OPEN else -1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value_at(config: object, key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = place[part] if isinstance(place, dict) else getattr(place, part)
    return place
