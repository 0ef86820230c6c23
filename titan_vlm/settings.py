"""Settings: a tree of frozen dataclasses, declared once and then read, overridden and shown.

A section is a frozen dataclass; each of its fields is declared with `setting(default, text, ...)`,
a section inside a section by its type alone, and one that may stand there many times as a setting
whose type is a list of a dataclass ([[data.sources]] in TOML, data.sources[0].weight in a message
and on the command line). From that one declaration come the check of a TOML table (`build`), the
typed command line (`pairs`, `override`) and the help (`help_lines`). This file knows nothing about
training; `config.py` declares the tree.

`update` lays a table over a tree that is there already, with the same checks. A section with a
field of `rest` keeps keys that it does not know for whoever lays them over a tree later.

Types: bool, int, float, str, Literal of strings, list of those, dict from name to one of those,
and a list or else one of some words (list[int] | Literal["all"]).
An int is taken where a float is wanted; a bool is never an int; NaN and infinity are refused.
"""

import copy
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import Field, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from titan_vlm.errors import ConfigError

ANY = "[n]"  # stands for the number of any table of a list
_NUMBER = re.compile(r"\[[0-9]+\]")
UNIONS = (UnionType, Union)  # of A | B, by what A and B are
MAX_INT = 2**63 - 1  # what every reader of TOML takes; tomllib knows no limit


def setting(
    default: Any,
    text: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
) -> Any:
    """A documented field. Bounds hold for a number, or for every number of a list or dict."""
    bounds = {">=": at_least, "<=": at_most, ">": above, "<": below}
    metadata = {
        "text": text,
        "bounds": {sign: bound for sign, bound in bounds.items() if bound is not None},
        "length": length,
    }
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)


def rest() -> Any:
    """A field for all keys of a table that the dataclass does not know, as TOML has them."""
    return field(default_factory=dict, metadata={"rest": True})


def build(cls: type, table: dict[str, Any], where: str) -> Any:
    """A `cls` from a TOML table; `where` (the file) is for messages."""
    return update(cls(), table, where)


def update(tree: Any, table: dict[str, Any], where: str) -> Any:
    """The tree with the values of a TOML table. Of a list of tables with names, those to change
    are given by name: { sources = { web = { weight = 2.0 } } }."""
    return _updated(tree, table, where, "", type(tree))


def _updated(tree: Any, table: dict[str, Any], where: str, prefix: str, root: type) -> Any:
    known = {f.name: f for f in fields(tree)}
    others = next((f.name for f in fields(tree) if f.metadata.get("rest")), None)
    values = {}
    for name, value in table.items():
        key = prefix + name
        if name not in known or name == others:
            if others is None:
                raise _unknown(root, key, where, is_table=isinstance(value, dict))
            values[others] = values.get(others, {}) | {name: value}
            continue
        kind, now = known[name].type, getattr(tree, name)
        if _table(kind) and now and isinstance(value, dict):
            values[name] = _by_name(now, value, key, where, root)
        elif not is_dataclass(kind):
            values[name] = _checked(value, known[name], key, where, root)
        elif isinstance(value, dict):
            values[name] = _updated(now, value, where, f"{key}.", root)
        else:
            raise ConfigError(f"{where}: {key}: expected a section [{key}], got {_show(value)}")
    return replace(tree, **values)


def _by_name(tables: list, changes: dict[str, Any], key: str, where: str, root: type) -> list:
    names = [table.name for table in tables]
    for name, change in changes.items():
        if name not in names:
            raise ConfigError(
                f"{where}: {key}.{name}: no table has this name; there are {', '.join(names)}"
            )
        if not isinstance(change, dict):
            raise ConfigError(f"{where}: {key}.{name}: expected a table, got {_show(change)}")
    return [
        _updated(table, changes.get(table.name, {}), where, f"{key}.{table.name}.", root)
        for table in tables
    ]


def as_table(tree: Any) -> dict[str, Any]:
    """The TOML table that `build` makes this tree of."""
    table: dict[str, Any] = {}
    for f in fields(tree):
        value = getattr(tree, f.name)
        if is_dataclass(f.type):
            table[f.name] = as_table(value)
        elif _table(f.type):
            table[f.name] = [as_table(item) for item in value]
        elif f.metadata.get("rest"):
            table |= value
        else:
            table[f.name] = value
    return table


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of every `--key text` and `--key=text` of a command line."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(
                f"command line: {word}: expected --config FILE or --section.key value"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(
                    f"command line: {key}: expected a value (--{key} VALUE), got none"
                )
            text = rest.pop(0)
        yield key, text


def override(tree: Any, key: str, text: str, where: str) -> Any:
    """The tree with `section.key` set to what the word `text` means for the type of that field.

    `section.tables[1].key` is of the second of tables that are there already; where these keep
    keys of the tree (`rest`), key may be one.
    """
    known = dict(leaves(type(tree)))
    table_key, _, inner = key.partition("].")
    if inner in known and (others := _rest_of(known, table_key)):
        inside = f"{table_key}].{others}"
        value = _parse(text, known[inner].type)
        try:
            kept = _merged(_at(tree, inside, where), inner.split("."), value)
        except TypeError as error:
            raise ConfigError(f"{where}: {key}: {error}") from error
        return _replaced(tree, inside.split("."), kept)
    f = known.get(_NUMBER.sub(ANY, key)) if ANY not in key else None
    if f is None:
        raise _unknown(type(tree), key, where)
    value = _checked(_parse(text, f.type), f, key, where, type(tree))
    try:
        return _replaced(tree, key.split("."), value)
    except IndexError as error:
        raise ConfigError(f"{where}: {key}: {error}") from error


def _rest_of(known: dict[str, Field], table_key: str) -> str | None:
    """The field that keeps other keys, of the tables of a list "section.tables[1"."""
    listed = known.get(table_key.partition("[")[0])
    table = _table(listed.type) if listed else None
    return next((f.name for f in fields(table) if f.metadata.get("rest")), None) if table else None


def _at(tree: Any, key: str, where: str) -> Any:
    for part in key.split("."):
        name, _, number = part.rstrip("]").partition("[")
        tree = getattr(tree, name)
        if number and not (number.isdigit() and int(number) < len(tree)):
            expected = f"expected the number of one of {len(tree)} table(s), counted from 0"
            raise ConfigError(f"{where}: {key}: {expected}")
        tree = tree[int(number)] if number else tree
    return tree


def _merged(table: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    if not isinstance(table, dict):
        raise TypeError(f"expected a table around {name}, got {table!r}")
    return table | {name: _merged(table.get(name, {}), rest, value) if rest else value}


def _replaced(tree: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    name, _, number = name.rstrip("]").partition("[")
    old = getattr(tree, name)
    if not number:
        return replace(tree, **{name: _replaced(old, rest, value) if rest else value})
    tables, place = list(old), int(number)
    if place >= len(tables):
        raise IndexError(f"expected the number of one of {len(tables)} table(s), counted from 0")
    tables[place] = _replaced(tables[place], rest, value)
    return replace(tree, **{name: tables})


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every (dotted key, field) of the tree, in the order of declaration; the keys of tables in a
    list come after the list, with [n] for their number."""
    for f in fields(cls):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        elif not f.metadata.get("rest"):
            yield prefix + f.name, f
            if table := _table(f.type):
                yield from leaves(table, f"{prefix}{f.name}{ANY}.")


def _table(kind: Any) -> type | None:
    """The dataclass of a list of tables."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return item if is_dataclass(item) else None


def help_lines(cls: type) -> Iterator[str]:
    """Section, key, type, default and text of every setting."""
    section = None
    for key, f in leaves(cls):
        if (new := key.rpartition(".")[0]) != section:
            section = new
            yield f"\n[{section}]"
        default = f.default_factory()
        yield f"  --{key}  ({_describe(f)}, default {_show(default)})"
        yield textwrap.fill(
            f.metadata["text"], width=100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )


def _checked(value: Any, f: Field, key: str, where: str, root: type) -> Any:
    if table := _table(f.type):
        return _tables(value, table, key, where, root)
    try:
        converted = _convert(value, f.type, f.metadata["bounds"])
    except _Unfit:
        converted = None
    length = f.metadata["length"]
    if converted is None or (length is not None and len(converted) != length):
        raise ConfigError(f"{where}: {key}: expected {_describe(f)}, got {_show(value)}")
    return converted


def _tables(value: Any, cls: type, key: str, where: str, root: type) -> list:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key}: expected tables [[{key}]], got {_show(value)}")
    for k, item in enumerate(value):
        if not isinstance(item, dict):
            raise ConfigError(f"{where}: {key}[{k}]: expected a table, got {_show(item)}")
    return [_updated(cls(), item, where, f"{key}[{k}].", root) for k, item in enumerate(value)]


class _Unfit(Exception):
    """The value does not have the type or the range; `_checked` says so in words."""


def _convert(value: Any, kind: Any, bounds: dict[str, float]) -> Any:
    origin = get_origin(kind)
    if origin in UNIONS:
        for option in get_args(kind):
            with suppress(_Unfit):
                return _convert(value, option, bounds)
        raise _Unfit
    if origin is list and isinstance(value, list):
        return [_convert(item, get_args(kind)[0], bounds) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(item, get_args(kind)[1], bounds) for k, item in value.items()}
    if origin is Literal and value in get_args(kind):
        return value
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value, kind, bounds)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise _Unfit


_HOLDS = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}


def _number(value: int | float, kind: type, bounds: dict[str, float]) -> int | float:
    if kind is int and (isinstance(value, float) or abs(value) > MAX_INT):
        raise _Unfit
    try:
        number = kind(value)
    except OverflowError as error:  # an integer beyond the range of a float
        raise _Unfit from error
    if kind is float and not math.isfinite(number):
        raise _Unfit
    if not all(_HOLDS[sign](number, bound) for sign, bound in bounds.items()):
        raise _Unfit
    return number


def _parse(text: str, kind: Any) -> Any:
    """The value a word of the command line stands for; what cannot be read stays text, and is
    refused by `_convert` like any other wrong type."""
    origin = get_origin(kind)
    if origin in UNIONS:
        words = [word for option in get_args(kind) for word in _words(option)]
        return text if text in words else _parse(text, get_args(kind)[0])
    if origin is dict or (origin is list and text.startswith("[")):
        return _parse_toml(text)
    if origin is list:
        item = get_args(kind)[0]
        return [_parse(part.strip(), item) for part in text.split(",") if part.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _parse_toml(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def _describe(f: Field) -> str:
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in f.metadata["bounds"].items())
    count = f"{f.metadata['length']} x " if f.metadata["length"] else ""
    words = "list of tables" if _table(f.type) else _kind(f.type, count)
    return f"{words} {bounds}".rstrip()


def _kind(kind: Any, count: str) -> str:
    origin = get_origin(kind)
    if origin in UNIONS:
        return " or ".join(_kind(option, count) for option in reversed(get_args(kind)))
    if origin is list:
        return f"list of {count}{_name(get_args(kind)[0])}"
    if origin is dict:
        return f"table of name = {_name(get_args(kind)[1])}"
    return _name(kind)


def _words(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _name(kind: Any) -> str:
    if words := _words(kind):
        return "|".join(words)
    return {bool: "true|false", int: "int", float: "finite float", str: "string"}[kind]


def _show(value: Any) -> str:
    """As a reader of TOML knows it (true, not True), and short."""
    try:
        shown = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return "a value too large to show"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _unknown(root: type, key: str, where: str, is_table: bool = False) -> ConfigError:
    if not is_table:
        known = [name for name, _ in leaves(root)]
        number = _NUMBER.search(key)
        nearest = _nearest(_NUMBER.sub(ANY, key), known).replace(ANY, number[0] if number else ANY)
        return ConfigError(f"{where}: {key}: unknown key; nearest known: {nearest}")
    sections = set(_sections(root))
    # A key may hold a table, too, but none does outside of a section.
    tables = [name for name, f in leaves(root) if get_origin(f.type) is dict and "." in key]
    nearest = _nearest(key, [*sorted(sections), *tables])
    if nearest in sections:
        return ConfigError(f"{where}: [{key}]: unknown section; nearest known: [{nearest}]")
    return ConfigError(f"{where}: {key}: unknown key; nearest known: {nearest}")


def _sections(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the tables that are dataclasses."""
    for f in fields(cls):
        if is_dataclass(f.type):
            yield prefix + f.name
            yield from _sections(f.type, f"{prefix}{f.name}.")


def _nearest(key: str, known: Iterable[str]) -> str:
    """The most similar known key; one that differs only in its section goes first."""

    key = key[:100]  # comparing takes time by the length of both

    def leaf(name: str) -> str:
        return name.rpartition(".")[2]

    def likeness(name: str) -> tuple[bool, float]:
        same = name if "." in key else leaf(name)
        return leaf(name) == leaf(key), SequenceMatcher(None, key, same).ratio()

    return max(known, key=likeness)
