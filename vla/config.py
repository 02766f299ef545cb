"""One complete YAML -> frozen dataclasses, with dotted overrides. No torch.

There is no inheritance, no interpolation and no default that the file does not show: a key that is
missing, unknown or of the wrong type is a `UsageError` that lists the valid ones. A field may be

* `bool`, `int`, `float` (an int is accepted), `str`, `pathlib.Path`, `Literal[...]`,
* `T | None`, `tuple[T, ...]`, `dict[str, T]`,
* another frozen dataclass, or a union of dataclasses that each carry a `kind: Literal["name"]` field.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vla.errors import TandemError, UsageError, choose_from

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers people write: `1e-4` is a float, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportArgumentType]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise UsageError(f"Key {key!r} is given twice, first in line {key_node.start_mark.line + 1}.")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as something else."""


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(c in text for c in "\x85\u2028\u2029")  # line breaks that PyYAML forgets to quote
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_string)

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$|^[-+]\.(?:inf|Inf|INF)$"
)
for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(cls: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:  # noqa: UP047 (parses on Python 3.10)
    """Read the YAML at `path`, apply overrides such as `optim.lr=1e-4`, build `cls`.

    Raises:
        UsageError: file absent or not YAML; key unknown, missing or of the wrong type.
    """
    return build(cls, override(read(path), overrides, cls), where=str(path))


def read(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UsageError(f"No such file: {path}.{choose_from(path.name, siblings)}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}.")
    return data


def override(data: Mapping[str, Any], overrides: Sequence[str], cls: type) -> dict[str, Any]:
    """`data` with each `dotted.key=yaml value` replaced. The parents must exist; `build` checks the last key."""
    result = _copy(dict(data))
    for item in overrides:
        dotted, sep, text = item.partition("=")
        if not sep or not dotted:
            raise UsageError(f"Override {item!r} must look like key.subkey=value.")
        target: Any = result
        *parents, last = dotted.split(".")
        for i, name in enumerate(parents):
            target = _step(target, name, ".".join(parents[:i]) or cls.__name__)
        _assign(target, last, _parse(text, item), item)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"Override {item!r}: the value is not valid YAML.") from error


def _step(target: Any, name: str, where: str) -> Any:
    if isinstance(target, list):
        if name.isdecimal() and int(name) < len(target):
            return target[int(name)]
        raise UsageError(f"{where} is a list of {len(target)}; {name!r} is not one of its indices.")
    if not isinstance(target, dict) or name not in target:
        keys = target if isinstance(target, dict) else ()
        raise UsageError(f"{where} has no key {name!r}.{choose_from(name, map(str, keys))}")
    return target[name]


def _assign(target: Any, last: str, value: Any, item: str) -> None:
    if isinstance(target, list):
        if not last.isdecimal() or int(last) >= len(target):
            raise UsageError(f"Override {item!r}: the list has {len(target)} entries, {last!r} is not an index.")
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise UsageError(f"Override {item!r}: there are no keys below this value ({target!r}).")


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:  # noqa: UP047 (parses on Python 3.10)
    """`data` as an instance of the dataclass `cls`; `where` prefixes error messages."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where or cls.__name__} must be a mapping with keys {_field_names(cls)}, got {data!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            raise UsageError(f"{where or cls.__name__}: unknown key {key!r}.{choose_from(key, fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [n for n in required if n not in data]
    if missing:
        raise UsageError(
            f"{where or cls.__name__}: missing key{'s' * (len(missing) > 1)} {missing}. Valid: {', '.join(fields)}."
        )
    values = {k: _value(hints[k], v, _below(where, k)) for k, v in data.items()}
    try:
        return cls(**values)
    except TandemError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from error


def _below(where: str, key: str) -> str:
    """The place of `key` in messages: `run.yaml`, then `run.yaml: optim`, then `run.yaml: optim.lr`."""
    if not where:
        return key
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(args, value, where)
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise UsageError(f"{where} is {value!r}.{choose_from(value, map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} must be a list, got {value!r}.")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise UsageError(f"{where} must have {len(args)} entries, got {len(value)}: {value!r}.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} must be a mapping, got {value!r}.")
        return {str(k): _value(args[1], v, _below(where, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # pyright: ignore[reportArgumentType]
    return _scalar(hint, value, where)


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    if len(kinds) == 1:
        return _value(kinds[0], value, where)
    if all(dataclasses.is_dataclass(k) for k in kinds):
        by_kind = {get_args(typing.get_type_hints(k)["kind"])[0]: k for k in kinds}
        if not isinstance(value, Mapping) or value.get("kind") not in by_kind:
            kind = value.get("kind") if isinstance(value, Mapping) else value
            raise UsageError(f"{where} needs a 'kind', got {kind!r}.{choose_from(kind, by_kind)}")
        return build(by_kind[value["kind"]], value, where)
    for kind in kinds:  # the first that fits
        with contextlib.suppress(UsageError):
            return _value(kind, value, where)
    names = " or ".join(k.__name__ if isinstance(k, type) else str(k).removeprefix("typing.") for k in kinds)
    raise UsageError(f"{where} must be {names}, got {value!r}.")


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    name = "a path" if hint is Path else getattr(hint, "__name__", str(hint))
    raise UsageError(f"{where} must be {name}, got {value!r} ({type(value).__name__}).")


def to_data(config: Any) -> Any:
    """The inverse of `build`: plain dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_data(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_data(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_data(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def dump(config: Any) -> str:
    """`config` as the complete YAML that `load` reads back to an equal value."""
    return yaml.dump(to_data(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def digest(config: Any) -> str:
    """12 hexadecimal digits that change when any value of `config` changes."""
    return hashlib.sha256(json.dumps(to_data(config), sort_keys=True).encode()).hexdigest()[:12]
