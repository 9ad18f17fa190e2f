"""What a configuration model offers: its keys, their types, defaults and help, as text and YAML."""

import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dqrm.yaml_text import Path as KeyPath
from dqrm.yaml_text import dump_value

_COMMENT_WIDTH = 96


@dataclass(frozen=True)
class FieldHelp:
    """One key of a configuration."""

    path: str
    """Dotted key, as used in an override."""
    kind: str
    """What a value may be, in words."""
    default: str
    """Default as YAML; "required" where there is none."""
    help: str
    """The string under the field."""
    choices: tuple[str, ...]
    """Every allowed value when there are only a few, else empty."""


def describe_fields(model: type[BaseModel]) -> list[FieldHelp]:
    """Every leaf key of ``model``, sections flattened to dotted paths, in the order written."""
    return list(_describe(model, ""))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[FieldHelp]:
    for key, field in _fields(model):
        path = f"{prefix}{key}"
        sections = section_models(field.annotation)
        if sections:
            yield from _merged(
                [help for section in sections for help in _describe(section, f"{path}.")]
            )
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        yield FieldHelp(
            path=path,
            kind=_kind(field.annotation, field.metadata),
            default="required" if default is PydanticUndefined else dump_value(_plain(default)),
            help=" ".join((field.description or "").split()),
            choices=_choices(field.annotation),
        )


def _merged(fields: list[FieldHelp]) -> list[FieldHelp]:
    """One entry a path, where several models may stand in one place (``split.by=...``)."""
    merged: dict[str, FieldHelp] = {}
    for field in fields:
        same = merged.get(field.path)
        if same is None:
            merged[field.path] = field
            continue
        kinds = dict.fromkeys((*same.kind.split(" or "), *field.kind.split(" or ")))
        choices = tuple(dict.fromkeys((*same.choices, *field.choices)))
        merged[field.path] = replace(same, kind=" or ".join(kinds), choices=choices)
    return list(merged.values())


def section_models(annotation: Any) -> list[type[BaseModel]]:
    """The models that may stand behind a key that holds a section; none for a plain value."""
    members = [member for member in _members(annotation) if member is not type(None)]
    return members if all(_is_model(member) for member in members) else []


def keys_at(model: type[BaseModel], path: KeyPath, tree: Any = None) -> list[str]:
    """Known keys of the section(s) found at ``path``; empty where no model lies there.

    Args:
        model: of the configuration.
        path: of the section.
        tree: a configuration as it was given. Where it says which of several kinds of section one
            is (``stage: report``), the keys are those of this kind.
    """
    places: list[Any] = [model]
    for part in path:
        tree = _item(tree, part)
        below: list[Any] = []
        for place in places:
            origin, arguments = get_origin(place), get_args(place)
            if _is_model(place):
                below += [f.annotation for key, f in _fields(place) if key == part]
            elif isinstance(part, int) and arguments:
                below += [argument for argument in arguments if argument is not Ellipsis]
            elif origin is dict:
                below.append(arguments[1])
        places = [member for place in below for member in _members(place)]
        said = [place for place in places if _is_said_kind(place, tree)]
        places = said or places
    return list(dict.fromkeys(k for place in places if _is_model(place) for k, _ in _fields(place)))


def _item(tree: Any, part: str | int) -> Any:
    if isinstance(tree, dict):
        return tree.get(part)
    if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
        return tree[part]
    return None


def _is_said_kind(place: Any, section: Any) -> bool:
    """Whether ``section`` says that it is of this model, by a field with a single choice."""
    if not _is_model(place) or not isinstance(section, dict):
        return False
    return any(get_args(f.annotation) == (section.get(key),) for key, f in _fields(place))


def to_yaml(config: BaseModel) -> str:
    """The whole configuration as YAML, each key under the help text of its field.

    Reading it back gives an equal configuration.
    """
    return "\n".join(_yaml_lines(config, ""))[1:] + "\n"


def _yaml_lines(config: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        key = _key(name, field)
        value = getattr(config, name)
        yield ""
        text = field.description
        if text is None and isinstance(value, BaseModel):
            text = (type(value).__doc__ or "").partition("\n")[0]
        for line in _wrapped(text or "", _COMMENT_WIDTH - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:"
            lines = list(_yaml_lines(value, indent + "  "))
            yield from lines[1:] if lines else [f"{indent}  {{}}"]
        elif isinstance(value, list | tuple) and any(isinstance(v, BaseModel) for v in value):
            yield f"{indent}{key}:"
            for item in value:
                yield f"{indent}- {dump_value(_plain(item))}"
        else:
            yield f"{indent}{key}: {dump_value(_plain(value))}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width)


def _plain(value: Any) -> Any:
    """``value`` with models, tuples and paths turned into what YAML and JSON know."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    return str(value)


def _fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(_key(name, field), field) for name, field in model.model_fields.items()]


def _key(name: str, field: FieldInfo) -> str:
    return field.alias or name


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation: Any) -> list[Any]:
    """Members of a union, in order, ``Annotated`` and type aliases opened; else the type itself."""
    if hasattr(annotation, "__value__"):  # a type alias; typing has its class from 3.12 on
        return _members(annotation.__value__)
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _choices(annotation: Any) -> tuple[str, ...]:
    found: list[str] = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            found += [dump_value(value) for value in get_args(member)]
        elif member is bool:
            found += ["true", "false"]
        elif member is type(None):
            found.append("null")
    closed = all(
        get_origin(member) is Literal or member in (bool, type(None))
        for member in _members(annotation)
    )
    return tuple(found) if closed else ()


_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
}


def _kind(annotation: Any, metadata: list[Any]) -> str:
    words = []
    optional = False
    for member in _members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if member is type(None):
            optional = True
        elif origin is Literal:
            words += [dump_value(value) for value in arguments]
        elif member in _WORDS:
            words.append(_WORDS[member])
        elif origin in (list, tuple, set, frozenset):
            inner = next(argument for argument in arguments if argument is not Ellipsis)
            words.append(f"list of {_kind(inner, _inner_metadata(inner))}")
        elif origin is dict:
            words.append(f"{{name: {_kind(arguments[1], _inner_metadata(arguments[1]))}}}")
        elif _is_model(member):
            words.append(f"{{{', '.join(key for key, _ in _fields(member))}}}")
        else:
            words.append(getattr(member, "__name__", str(member)))
    bounds = [_bound(entry) for entry in [*metadata, *_inner_metadata(annotation)]]
    words[-1] = " ".join([words[-1], *filter(None, bounds)])
    if optional:
        words.append("null")
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]


def _inner_metadata(annotation: Any) -> list[Any]:
    """Bounds written inside an optional type, such as ``PositiveInt | None``."""
    found: list[Any] = []
    if get_origin(annotation) is typing.Annotated:
        found += get_args(annotation)[1:]
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            found += _inner_metadata(part)
    return found


def _bound(entry: Any) -> str:
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        limit = getattr(entry, name, None)
        if limit is not None:
            return f"{sign} {limit}"
    return ""
