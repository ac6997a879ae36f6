"""Passes out of tables of options, as TOML files have them; what is wrong is told with file, pass, option, reason."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from qcompiler import registry
from qcompiler.errors import BadOption

if TYPE_CHECKING:
    from qcompiler.pipeline import Pass

_WORDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def build_pass(table: dict[str, Any], where: str) -> Pass:
    """A pass from its table: `name`, and its options.

    Args:
        table: is used up.
        where: the file or option that it is from, for messages.

    Raises:
        BadOption: no such pass, no such option, or a value that the pass refuses: which and why.
    """
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise BadOption("a [[pass]] table has no name", where=where)
    if name not in registry.names("passes"):
        known_passes = ", ".join(sorted(registry.names("passes")))
        raise BadOption(f"there is no pass '{name}'", where, f"choose one of {known_passes}")
    cls: type[Pass] = registry.find("passes", name)
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise BadOption(f"pass '{name}' has no option '{unknown[0]}'", where, f"it has {', '.join(known) or 'none'}")
    kinds = _kinds(cls)
    options = {key: _checked(name, known[key], value, kinds.get(key, Any), where) for key, value in table.items()}
    try:
        return cls(**options)
    except BadOption as error:
        raise _of_options(cls, name, options, error, where) from error


def _of_options(cls: type[Pass], name: str, options: dict[str, Any], error: BadOption, where: str) -> BadOption:
    """What is wrong with the options of a pass: the ones without any of which it would be right."""
    reason = error
    guilty = [key for key in options if _refuses(cls, {k: v for k, v in options.items() if k != key}) is None]
    for key, value in options.items() if not guilty else ():  # several are wrong: the first one of them
        found = _refuses(cls, {key: value})
        if found is not None:
            guilty, reason = [key], found
            break
    if len(guilty) != 1:
        told = " and ".join(f"'{key}'" for key in guilty or options)
        return BadOption(f"options {told} of pass '{name}': {reason.what}", where, reason.fix)
    value = options[guilty[0]]
    what = f"option '{guilty[0]}' of pass '{name}' is {value!r}"
    same = reason.what == f"option '{guilty[0]}' is {value}"  # as `check_numbers` says it
    return BadOption(what if same else f"{what}: {reason.what}", where, reason.fix)


def _refuses(cls: type[Pass], options: dict[str, Any]) -> BadOption | None:
    try:
        cls(**options)
    except BadOption as error:
        return error
    except TypeError:  # it has options that must be given
        return None
    return None


def _kinds(cls: type[Pass]) -> dict[str, Any]:
    """The annotations of a class; none where another package's names something that only type checkers import."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _checked(name: str, option: Field[Any], value: Any, kind: Any, where: str) -> Any:
    """A value out of TOML as the option wants it: lists as tuples, one value for a list of one."""
    value = _tuples(value)
    if not _fits(value, kind):
        if not _fits((value,), kind):
            example = "" if option.default in (MISSING, "", ()) else f", such as {toml_value(option.default)}"
            what = f"option '{option.name}' of pass '{name}' is {value!r}"
            raise BadOption(what, where, f"give {_described(kind)}{example}")
        value = (value,)
    return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value  # type: ignore[reportUnknownArgumentType]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; a whole number is a number, true and false are neither."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args  # type: ignore[reportUnknownArgumentType]
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))  # type: ignore[reportUnknownArgumentType]
    if kind is float:
        return type(value) in (float, int)
    plain = origin or kind
    if plain is Any or not isinstance(plain, type):
        return True
    return isinstance(value, plain) and not (plain is int and isinstance(value, bool))


def _described(kind: Any) -> str:
    """An annotation in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, args))
    if origin is Literal:
        return " or ".join(map(toml_value, args))
    if origin is tuple:
        return f"a list, each {_described(args[0])}" if args[1:] == (...,) else f"a list of {len(args)}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def toml_value(value: Any) -> str:
    """A value of an option as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"  # type: ignore[reportUnknownArgumentType]
    return repr(value)
