"""Loading of a typed configuration: defaults, then a YAML file, then dotted overrides.

    config = load(RunConfig, "census", ["quant.bits=8", "optim.lr=1e-2"])

Every fault is reported at once, each with its dotted path, the value got and what is allowed;
an unknown key is a fault that names the nearest known one.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dqrm.configuration_fields import FieldHelp, describe_fields, keys_at, to_yaml
from dqrm.yaml_text import ConfigError, Document, dump_value, parse_document, parse_value
from dqrm.yaml_text import Path as KeyPath

__all__ = [
    "ConfigError",
    "FieldHelp",
    "Override",
    "describe_fields",
    "first_fault",
    "keys_at",
    "load",
    "parse_override",
    "shipped_configs",
    "shipped_text",
    "suggestion",
    "to_yaml",
]

Model = TypeVar("Model", bound=BaseModel)

# Not importlib.resources: in an editable install, Python 3.11 cannot list a folder through it.
_SHIPPED = Path(__file__).parent / "configs"

_SHOWN_CHARACTERS = 60
_PREFIX_LETTERS = 4
_PUNCTUATION = re.compile(r"""[^\w'"\[\]{}~]+""")


@dataclass(frozen=True)
class Override:
    """``key.path=value`` from the command line: its parsed value and its text."""

    path: tuple[str, ...]
    value: Any
    text: str

    @property
    def key(self) -> str:
        """The dotted key."""
        return ".".join(self.path)


def parse_override(argument: str) -> Override:
    """Split ``quant.bits=4`` into its path and its value, read as YAML.

    Raises ConfigError when there is no ``=``, no key, or the value is not YAML.
    """
    key, equals, text = argument.partition("=")
    if not equals:
        raise ConfigError(f"'{argument}': expected key=value, for example quant.bits=4")
    path = tuple(key.strip().split("."))
    if not all(path):
        raise ConfigError(f"'{argument}': expected a dotted key before '=', such as optim.lr")
    if _PUNCTUATION.fullmatch(text):
        # `delimiter=|` means the character, not the start of a YAML block.
        return Override(path, text, text)
    try:
        return Override(path, parse_value(text), text)
    except ConfigError as error:
        raise ConfigError(f"{argument}: {error}; text needs quotes: '\"...\"'") from error


def load(
    model: type[Model],
    source: str | Path | None = None,
    overrides: Iterable[str] = (),
) -> Model:
    """Build ``model`` from its defaults, the file and the overrides, in that order.

    Args:
        model: the pydantic model to fill.
        source: a YAML file, or the name of a shipped configuration; None for defaults only.
        overrides: ``key.path=value`` texts; a later one wins over an earlier one.

    Raises:
        ConfigError: for every fault of file, overrides and values, all in one message.
        FileNotFoundError: when there is no such file.
    """
    name, document = ("", Document({}, {})) if source is None else _read(source)
    tree = copy.deepcopy(document.tree)
    faults: list[str] = []
    given: dict[KeyPath, Override] = {}
    for argument in overrides:
        try:
            override = parse_override(argument)
            given[_assign(tree, override)] = override
        except ConfigError as error:
            faults.append(str(error))
    _name_kinds(model, tree)
    try:
        loaded = _validate(model, tree, given)
        faults += _booleans_as_numbers(tree, loaded.model_dump(by_alias=True), ())
    except ValidationError as error:
        faults += _describe_faults(model, error, tree, name, document, given)
    if not faults:
        return loaded
    if len(faults) == 1:
        raise ConfigError(faults[0])
    listed = "".join(f"\n  {fault}" for fault in faults)
    raise ConfigError(f"{len(faults)} faults in the configuration:{listed}")


def shipped_configs() -> dict[str, str]:
    """Shipped configuration names, each with what its file says it is for.

    A file opens with the command that runs it and an empty comment; the line after says it.
    """
    names = {}
    for path in sorted(_SHIPPED.rglob("*.yaml")):
        purpose = path.read_text(encoding="utf-8").splitlines()[2]
        name = path.relative_to(_SHIPPED).with_suffix("").as_posix()
        names[name] = purpose.removeprefix("#").strip()
    return names


def shipped_text(name: str) -> str:
    """Text of a shipped configuration.

    Raises ConfigError naming the nearest one when there is none of that name.
    """
    names = list(shipped_configs())
    if name not in names:
        near = _nearest(name, names)
        hint = f"did you mean {near}?" if near else f"there are: {', '.join(names) or 'none'}"
        raise ConfigError(f"no shipped configuration is called '{name}'; {hint}")
    return (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def _read(source: str | Path) -> tuple[str, Document]:
    path = Path(source)
    looks_like_file = isinstance(source, Path) or path.suffix in (".yaml", ".yml", ".json")
    if not looks_like_file and not path.is_file():
        return f"{source} (shipped)", parse_document(shipped_text(str(source)), f"{source}.yaml")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such configuration file; `dqrm configs ls` lists the shipped ones"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a configuration file") from None
    return str(path), parse_document(text, str(path))


def _assign(tree: dict[str, Any], override: Override) -> KeyPath:
    """Put the value into ``tree``; return where it is, with positions in lists as numbers."""
    place: Any = tree
    path: list[str | int] = []
    for depth, part in enumerate(override.path):
        is_list = isinstance(place, list)
        key: Any = _position(place, part, override, depth) if is_list else part
        path.append(key)
        if depth == len(override.path) - 1:
            break
        below = place[key] if is_list else place.get(key)
        if below is None:
            below = place[key] = {}
        if not isinstance(below, dict | list):
            section = ".".join(override.path[: depth + 1])
            raise ConfigError(
                f"{override.key}={override.text}: {section} is {_shown(below)}, not a section"
            )
        place = below
    place[path[-1]] = override.value
    return tuple(path)


def _position(items: list[Any], part: str, override: Override, depth: int) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    name = ".".join(override.path[:depth])
    raise ConfigError(
        f"{override.key}={override.text}: {name} is a list; name an item by its position, "
        f"0 to {len(items) - 1}"
    )


def _name_kinds(model: type[BaseModel], tree: dict[str, Any]) -> None:
    """Fill in which kind of section the default is, so that ``split.test=0.2`` need not say."""
    for name, field in model.model_fields.items():
        section = tree.get(field.alias or name)
        tag = field.discriminator
        if isinstance(tag, str) and isinstance(section, dict) and tag not in section:
            default = field.get_default(call_default_factory=True, validated_data={})
            if isinstance(default, BaseModel):
                section[tag] = getattr(default, tag)


def _validate(model: type[Model], tree: dict[str, Any], given: dict[KeyPath, Override]) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # `name=2024` means the text: what YAML made a number goes back to what was typed.
        retyped = False
        for fault in error.errors():
            override = given.get(_path(fault, tree))
            if override is None or override.value is None:
                continue
            if fault["type"] in ("string_type", "path_type"):
                _assign(tree, Override(override.path, override.text, override.text))
                retyped = True
        if not retyped:
            raise
    return model.model_validate(tree)


def _booleans_as_numbers(given: Any, loaded: Any, path: KeyPath) -> list[str]:
    """Faults for true and false where a number is meant; pydantic would take them as 1 and 0."""
    if isinstance(given, dict) and isinstance(loaded, dict):
        pairs: list[tuple[str | int, Any, Any]] = [
            (key, value, loaded[key]) for key, value in given.items() if key in loaded
        ]
    elif isinstance(given, list) and isinstance(loaded, list | tuple):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(given, loaded, strict=False))]
    elif isinstance(given, bool) and not isinstance(loaded, bool) and loaded == given:
        return [f"{'.'.join(map(str, path))}={dump_value(given)}: must be a number"]
    else:
        return []
    return [fault for key, a, b in pairs for fault in _booleans_as_numbers(a, b, (*path, key))]


def _path(fault: ErrorDetails, tree: Any) -> KeyPath:
    """The keys of a fault, without the names pydantic adds for members of a union."""
    path: list[str | int] = []
    place = tree
    for position, part in enumerate(fault["loc"]):
        last = position == len(fault["loc"]) - 1
        if _has(place, part):
            place = place[part]
        elif not (last and fault["type"] == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _has(place: Any, part: str | int) -> bool:
    if isinstance(place, list):
        return isinstance(part, int) and part < len(place)
    return isinstance(place, dict) and part in place


def _describe_faults(
    model: type[BaseModel],
    error: ValidationError,
    tree: dict[str, Any],
    name: str,
    document: Document,
    given: dict[KeyPath, Override],
) -> list[str]:
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for fault in error.errors(include_url=False):
        grouped.setdefault(_path(fault, tree), []).append(fault)
    described = []
    for path, faults in grouped.items():
        key = ".".join(map(str, path))
        from_command_line = any(path[: len(other)] == other for other in given)
        where = ""
        if name and not from_command_line:
            line = next(
                (
                    document.lines[path[:n]]
                    for n in range(len(path), 0, -1)
                    if path[:n] in document.lines
                ),
                None,
            )
            where = f"{name}:{line}: " if line else f"{name}: "
        first = faults[0]
        if first["type"] == "union_tag_invalid":
            tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "")
            which = first["ctx"]["discriminator"].strip("'")
            described.append(f"{where}{key}.{which}={tag}: must be one of {expected}")
            continue
        if first["type"] == "extra_forbidden":
            described.append(f"{where}{key}: unknown key; {suggestion(model, path, tree)}")
            continue
        if first["type"] == "too_short" and any(_below(other, path) for other in grouped):
            # Items with faults of their own were not counted.
            continue
        messages = list(dict.fromkeys(_message(fault) for fault in faults))
        text = " or ".join(messages)
        value = first["input"]
        shown = "" if first["type"] == "missing" or _is_section(value) else f"={_shown(value)}"
        described.append(f"{where}{key}{shown}: {text}" if key else f"{where}{text}")
    return described


def _below(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def _is_section(value: object) -> bool:
    return isinstance(value, dict | BaseModel)


_PLAIN_MESSAGES = {
    "missing": "is required",
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list, such as [a, b]",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be a section of keys, such as {C3: 8}",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "path_type": "must be a path",
}


def _message(fault: ErrorDetails) -> str:
    kind = fault["type"]
    if kind == "union_tag_not_found":
        return f"the key {fault['ctx']['discriminator']} is required".replace("'", "")
    if kind in _PLAIN_MESSAGES:
        plain = _PLAIN_MESSAGES[kind]
        below = isinstance(fault["input"], dict) and "section" not in plain and kind != "missing"
        return f"{plain.partition(';')[0]}, not a section" if below else plain
    if kind == "too_short":
        least = fault["ctx"]["min_length"]
        return f"must have {least} item{'s' if least > 1 else ''} or more"
    if kind == "literal_error":
        return f"must be {fault['ctx']['expected']}"
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return text.replace("Input should be", "must be", 1)


def first_fault(error: ValidationError, tree: Any) -> str:
    """The first fault of a value that is checked by itself, with its path within the value."""
    fault = error.errors(include_url=False)[0]
    path = ".".join(map(str, _path(fault, tree)))
    text = "unknown key" if fault["type"] == "extra_forbidden" else _message(fault)
    return f"{path}: {text}"


def suggestion(model: type[BaseModel], path: KeyPath, tree: Any = None) -> str:
    """What a person may have meant by a key that ``model`` does not have at ``path``.

    Args:
        model: of the configuration.
        path: of the unknown key.
        tree: what was given, which tells of sections of several kinds which one it is.
    """
    siblings = keys_at(model, path[:-1], tree)
    prefix = ".".join(map(str, path[:-1]))
    near = _nearest(str(path[-1]), siblings)
    if near:
        return f"did you mean {prefix}.{near}?" if prefix else f"did you mean {near}?"
    # The right name in the wrong section: `lr=0.1` for `optim.lr=0.1`.
    known = [field.path for field in describe_fields(model)]
    last = str(path[-1])
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    if not elsewhere:
        tails = {key.rpartition(".")[2]: key for key in reversed(known)}
        tail = _nearest(last, list(tails))
        elsewhere = [tails[tail]] if tail else []
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(siblings)}"


def _nearest(name: str, known: Sequence[str]) -> str | None:
    lowered = {other.lower(): other for other in reversed(known)}
    matches = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    if matches:
        return lowered[matches[0]]
    # Shortened or written out: `quantization` for quant, `warmup` for warmup_steps.
    for other, original in lowered.items():
        if min(len(name), len(other)) >= _PREFIX_LETTERS and (
            name.lower().startswith(other) or other.startswith(name.lower())
        ):
            return original
    return None


def _shown(value: object) -> str:
    text = dump_value(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
