"""Keys and values of a configuration: which keys exist, of which type, and how a value from outside gets in.

A key is a dotted path to a field of the nested dataclasses, `optim.lr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

_hints: Callable[[type], dict[str, Any]] = cache(
    get_type_hints
)  # slow, and a command line asks for the same few
MAX_SHOWN = 200  # characters of a value that a message repeats


class ConfigError(ValueError):
    """A configuration that cannot run. `problems` holds one line each: `key=value: reason; way out`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Key -> type hint of every field below a dataclass instance, in the order of declaration."""
    found: dict[str, Any] = {}
    hints = _hints(type(node))
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            found |= leaves(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = hints[f.name]
    return found


def get(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def put(cfg: Any, key: str, value: Any) -> None:
    *path, name = key.split(".")
    setattr(get(cfg, ".".join(path)) if path else cfg, name, value)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type that the field declares. Nothing is guessed: 1.5 is no int, 1 no bool, 7 no text.

    Raises ValueError with reason and way out.
    """
    if _holds(value, lambda v: v == "???" or isinstance(v, str) and "${" in v):
        raise ValueError("references and ??? are not resolved here; write the value itself")
    if hint is Any:
        return value
    kinds = get_args(hint) or (hint,)
    if value is None:
        if NoneType in kinds:
            return None
        raise ValueError("null is no value for this key; leave it out for the default")
    kind = next(k for k in kinds if k is not NoneType)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"a {type(value).__name__} where text is wanted; put it in quotes")
        if not value:
            raise ValueError("an empty value; give one or leave the key out")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("neither true nor false; write one of the two")
        return value
    if kind is int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            raise ValueError(f"not an integer as written; write {int(value)}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("not an integer; write digits only")
        return value
    assert kind is float, hint
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("not a number; write one like 0.1 or 1e-3")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("too large for a number; write a smaller one") from None


def _holds(value: Any, test: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds(v, test) for pair in value.items() for v in pair)
    if isinstance(value, list):
        return any(_holds(v, test) for v in value)
    return bool(test(value))


def show(text: object) -> str:
    """`text` as it can stand in one line of a message: control characters escaped, cut after MAX_SHOWN."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."


def nearest(name: str, known: list[str]) -> str:
    """`did you mean X?`, or an empty text when nothing is near. `lr` finds `optim.lr`."""
    ends = {k.rsplit(".", 1)[-1]: k for k in known}
    hit = get_close_matches(name, known, 1, 0.7) or get_close_matches(
        name.rsplit(".", 1)[-1], list(ends), 1, 0.7
    )
    return f"did you mean {ends.get(hit[0], hit[0])}?" if hit else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Key -> value of one YAML file, nested mappings flattened. Raises ConfigError naming the file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.load(path)
        tree = OmegaConf.to_container(node, resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {show(' '.join(str(error).split()))}"]) from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError([f"{path}: holds no keys and values"])
    return _flat(tree)


def _flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _whole(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """`values` with a mapping that is the value of a key, as activations.group's may be, in one again."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        head, _, name = key.rpartition(".")
        if key not in known and known.get(head) is Any:
            whole.setdefault(head, {})[name] = value
        else:
            whole[key] = value
    return whole


def apply(cfg: Any, values: dict[str, Any], elsewhere: Callable[[str], str]) -> list[str]:
    """Put key -> value into `cfg`, one by one; returns a line for each unknown key or wrong type.

    `elsewhere` may say more than "no such key" about a key that `cfg` lacks.
    """
    known, found = leaves(cfg), []
    for key, value in _whole(values, known).items():
        if key not in known:
            reason = elsewhere(key) or f"no such key; {nearest(key, list(known)) or 'see --help'}"
            found.append(f"{show(key)}={show(value)}: {reason}")
            continue
        try:
            put(cfg, key, convert(value, known[key]))
        except ValueError as error:
            found.append(f"{key}={show(value)}: {error}")
    return found
