"""YAML as people write it: 1e-3 is a number, a repeated key is an error, lines are known.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``2019-11-24`` is a date and
``1:30`` is ninety. This module reads the core schema of YAML 1.2 instead (yaml.org/spec/1.2.2,
section 10.3.2), in which only true, false, null and numbers are not text. Keys are always text.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names every fault and its place."""


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, and the line (from 1) on which each key or item stands."""

    tree: dict[str, Any]
    lines: dict[Path, int]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2 and no repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key_node.value in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' is given twice", key_node.start_mark
                )
            mapping[key_node.value] = self.construct_object(value_node, deep=deep)
        return mapping


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # Base 0 refuses a leading zero, which YAML 1.2 reads as decimal.
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern.pattern})$"), _first
    )
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _QuotingDumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 alone would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_QuotingDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789")
)


def parse_document(text: str, name: str) -> Document:
    """Parse a YAML file whose top level holds keys.

    Raises ConfigError naming ``name:line:column`` for text that is not YAML.
    """
    try:
        loader = _CoreLoader(text)
        try:
            root = loader.get_single_node()
            lines: dict[Path, int] = {}
            if root is not None:
                _collect_lines(root, (), lines, set())
            tree = loader.construct_document(root) if root is not None else {}
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, text, name)) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}:1:1: expected keys such as 'quant:', found {_kind(tree)}")
    return Document(tree, lines)


def parse_value(text: str) -> Any:
    """Parse one value as it would read after ``key:`` in a file.

    Raises ConfigError saying what is wrong with it.
    """
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not a YAML value: {problem}") from error


def dump_value(value: Any) -> str:
    """One line of YAML that reads back as the same value under YAML 1.1 and 1.2."""
    text = yaml.dump(
        value, Dumper=_QuotingDumper, default_flow_style=True, width=2**31, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def dump_document(tree: dict[str, Any]) -> str:
    """A file of keys, in their order, that reads back as the same under YAML 1.1 and 1.2."""
    return yaml.dump(tree, Dumper=_QuotingDumper, sort_keys=False)


def _collect_lines(
    node: yaml.Node, path: Path, lines: dict[Path, int], open_nodes: set[int]
) -> None:
    if id(node) in open_nodes:
        raise yaml.constructor.ConstructorError(
            None, None, "an alias refers to itself", node.start_mark
        )
    open_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, str(key.value))
            lines[child] = key.start_mark.line + 1
            _collect_lines(value, child, lines, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            child = (*path, position)
            lines[child] = item.start_mark.line + 1
            _collect_lines(item, child, lines, open_nodes)
    open_nodes.discard(id(node))


def _syntax_message(error: yaml.YAMLError, text: str, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not YAML"
        if mark is None:
            return f"{name}: {problem}"
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        return f"{name}:{mark.line + 1}:{mark.column + 1}: {problem}{hint}"
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line = before.count("\n") + 1
        column = error.position - (before.rfind("\n") + 1) + 1
        return f"{name}:{line}:{column}: the character {text[error.position]!r} is not allowed"
    return f"{name}: {error}"


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    return f"the single value {dump_value(value)}"
