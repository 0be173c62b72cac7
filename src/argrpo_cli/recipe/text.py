"""YAML as recipes, `--set` and the options of rewards are read, and as recipes are written: by the same rules, so that
what is written reads back as it was.

Those are YAML 1.2's core schema: 2e-4 is a number, `no` a word, and there are no dates. A key given twice is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from argrpo_cli.system.errors import UserError, shortened

MOST_VALUES = 100_000  # that a document stands for, what is behind its aliases counted each time
MOST_LEVELS = 50  # of mappings and lists in each other
TAG = "tag:yaml.org,2002:"
NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
PLAIN: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {  # kind to its pattern, first characters and value
    "null": (r"(?:null|Null|NULL|~|)", ["n", "N", "~", ""], lambda text: None),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF"), lambda text: text.lower() == "true"),
    "int": (r"[-+]?(?:0|[1-9][0-9]{0,18})", list("-+0123456789"), int),
    "float": (
        rf"(?:{NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}


class _Reader(yaml.SafeLoader):
    """Reads the core schema and nothing else; every fault is a YAMLError, with the line where it has one."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own extension points)
    yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        values, levels = (0, 0) if node is None else _extent(node, {})
        if values > MOST_VALUES:
            raise ConstructorError(None, None, f"it stands for more than {MOST_VALUES} values, with its aliases")
        if levels > MOST_LEVELS:
            raise RecursionError
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"the key {shortened(key)} is not text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {shortened(key)} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.Node) -> str:
        text = self.construct_scalar(node)
        try:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON writes an emoji as two halves
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise ConstructorError(None, None, "text with a null byte or half a character in it", node.start_mark)
        return text

    def construct_plain(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix(TAG), self.construct_scalar(node)
        pattern, _, value = PLAIN[kind]
        if not re.fullmatch(pattern, text):
            raise ConstructorError(None, None, f"{shortened(text)} is no {kind}", node.start_mark)
        if kind == "float" and math.isinf(value(text)) and "inf" not in text.lower():
            raise ConstructorError(None, None, f"{shortened(text)} is too large a number", node.start_mark)
        return value(text)

    def construct_other(self, node: yaml.Node) -> Any:
        tag = node.tag.replace(TAG, "!!")
        raise ConstructorError(
            None, None, f"the tag {shortened(tag)} means nothing here; leave it out", node.start_mark
        )


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and in how many levels; too many where it is within itself."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1, 1
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [one for pair in parts for one in pair]
        inner = [_extent(one, known) for one in parts]
        values, levels = 1 + sum(one for one, _ in inner), 1 + max((one for _, one in inner), default=0)
        known[id(node)] = min(values, MOST_VALUES + 1), levels
    return known[id(node)]


class _Writer(yaml.SafeDumper):
    """Quotes what this reader or one of YAML 1.1 would not take for text, and writes everything in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:  # in single quotes some line ends would become others
        return self.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


for _kind, (_pattern, _first, _) in PLAIN.items():
    _Reader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
    _Reader.add_constructor(TAG + _kind, _Reader.construct_plain)
    _Writer.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
_Reader.add_constructor(f"{TAG}str", _Reader.construct_text)
_Reader.add_constructor(f"{TAG}seq", _Reader.construct_yaml_seq)
_Reader.add_constructor(f"{TAG}map", _Reader.construct_yaml_map)
_Reader.add_constructor(None, _Reader.construct_other)
_Writer.add_representer(str, _Writer.represent_text)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document: mappings, lists, texts, numbers, true, false and null.

    Raises:
        UserError: one line that names `source`, the line and the fault.
    """
    try:
        return yaml.load(text, Loader=_Reader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{source}{where}: not valid YAML: {what}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from error


def write_yaml(tree: Any) -> str:
    """Plain values as YAML, in their order; `parse_yaml` reads back equal ones."""
    return yaml.dump(tree, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=110)
