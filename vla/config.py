"""One complete YAML -> frozen dataclasses, with dotted overrides. No torch.

There is no inheritance, no interpolation and no default that the file does not show: a key that is
missing, unknown or of the wrong type is a `UsageError` that lists the valid ones. A field may be

* `bool`, `int`, `float` (an int is accepted), `str`, `pathlib.Path`, `Literal[...]`,
* `T | None`, `tuple[T, ...]`, `dict[str, T]`,
* another frozen dataclass, or a union of dataclasses that each carry a `kind: Literal["name"]` field.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vla.errors import UsageError, choose_from

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers people write: `1e-4` is a float, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportArgumentType]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"Key {key!r} is given twice{node.start_mark}.")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$|^[-+]\.(?:inf|Inf|INF)$"
    ),
    list("-+0123456789."),
)


def load(cls: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
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
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}.")
    return data


def override(data: Mapping[str, Any], overrides: Sequence[str], cls: type) -> dict[str, Any]:
    """`data` with each `dotted.key=yaml value` replaced. The key must exist in `data` or in `cls`."""
    result = _copy(dict(data))
    for item in overrides:
        dotted, sep, text = item.partition("=")
        if not sep or not dotted:
            raise UsageError(f"Override {item!r} must look like key.subkey=value.")
        target: Any = result
        *parents, last = dotted.split(".")
        for i, name in enumerate(parents):
            target = _step(target, name, ".".join(parents[:i]) or cls.__name__)
        if isinstance(target, dict) and last not in target and parents:
            raise UsageError(f"Override {item!r}: no key {last!r}.{choose_from(last, map(str, target))}")
        if isinstance(target, dict) and last not in target and last not in _field_names(cls):
            raise UsageError(f"Override {item!r}: no key {last!r}.{choose_from(last, _field_names(cls))}")
        _assign(target, last, _parse(text, item), item)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"Override {item!r}: the value is not valid YAML.") from error


def _step(target: Any, name: str, where: str) -> Any:
    if isinstance(target, list):
        if name.isdigit() and int(name) < len(target):
            return target[int(name)]
        raise UsageError(f"{where} is a list of {len(target)}; {name!r} is not one of its indices.")
    if not isinstance(target, dict) or name not in target:
        keys = target if isinstance(target, dict) else ()
        raise UsageError(f"{where} has no key {name!r}.{choose_from(name, map(str, keys))}")
    return target[name]


def _assign(target: Any, last: str, value: Any, item: str) -> None:
    if isinstance(target, list):
        if not last.isdigit() or int(last) >= len(target):
            raise UsageError(
                f"Override {item!r}: the list has {len(target)} entries, {last!r} is not an index."
            )
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise UsageError(f"Override {item!r}: there are no keys below this value ({target!r}).")


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """`data` as an instance of the dataclass `cls`; `where` prefixes error messages."""
    if not isinstance(data, Mapping):
        raise UsageError(
            f"{where or cls.__name__} must be a mapping with keys {_field_names(cls)}, got {data!r}."
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            raise UsageError(f"{where}: unknown key {key!r}.{choose_from(key, fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [n for n in required if n not in data]
    if missing:
        raise UsageError(
            f"{where}: missing key{'s' * (len(missing) > 1)} {missing}. Valid: {', '.join(fields)}."
        )
    return cls(
        **{
            k: _value(hints[k], v, f"{where}: {k}" if "." not in where else f"{where} {k}")
            for k, v in data.items()
        }
    )


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
        return {str(k): _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
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
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in by_kind:
            raise UsageError(f"{where} needs a 'kind', got {kind!r}.{choose_from(kind, by_kind)}")
        return build(by_kind[kind], value, where)
    for kind in kinds:  # simple types only: the first that fits exactly
        if type(value) is kind:
            return value
    return _value(kinds[0], value, where)


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
    return yaml.safe_dump(to_data(config), sort_keys=False, allow_unicode=True, width=100)


def digest(config: Any) -> str:
    """12 hexadecimal digits that change when any value of `config` changes."""
    return hashlib.sha256(json.dumps(to_data(config), sort_keys=True).encode()).hexdigest()[:12]
