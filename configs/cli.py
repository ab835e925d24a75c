"""From a command line to a checked Config: Hydra's groups and syntax, every problem at once, one line each.

Hydra composes the group files; the values of the command line are then put in one by one, because Hydra would
stop at the first bad one. Order of precedence: dataclass, group file, recipe, command line.
"""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .groups import FOLDER, GROUPS, group_options
from .help import help_text
from .schema import SCHEMAS, Config, ConfigError, blank, elsewhere, register, to_yaml
from .values import apply, convert, get, leaves, nearest, put, read_yaml, show

__all__ = ["answer", "help_text", "parse"]

NAMED_BY_GROUP = {"optim.name": "optim", "data.name": "data"}


def parse(argv: list[str], folder: Path = FOLDER) -> Config:
    """The configuration that `argv` (without the program's name) asks for; group files are in `folder`.

    Raises ConfigError with every problem: one line each, with the key and the value as they were typed.
    """
    problems: list[str] = []
    failed: set[str] = set()
    choices: dict[str, str] = {}
    values: dict[str, tuple[Any, str]] = {}
    known = [*GROUPS, *dict.fromkeys(key for cfg in _methods() for key in leaves(cfg))]
    seen: dict[str, str] = {}
    for arg in argv:
        try:
            key, value = _read(arg, known, folder)
            if key in seen:
                raise ValueError(f"given twice, also as {show(seen[key])}; keep one")
            seen[key] = arg
        except ValueError as error:
            problems.append(f"{show(arg) or repr(arg)}: {error}")
            failed.add(arg.partition("=")[0].lstrip("+~-"))
            continue
        if key in GROUPS:
            choices[key] = value
        else:
            values[key] = (value, arg.split("=", 1)[1])
    try:
        cfg, names = _compose(tuple(sorted(choices.items())), folder)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if "optim" in failed:  # the method that was meant is the one that takes most of what was typed
        tries = [_fill(replace(cfg, optim=other.optim), values, failed, folder) for other in _methods()]
        cfg, found = min(tries, key=lambda t: (len(set(values) - set(leaves(t[0]))), len(t[1])))
    else:
        cfg, found = _fill(cfg, values, failed, folder)
    if problems + found:
        raise ConfigError(list(dict.fromkeys(problems + found)))
    if cfg.run.name is None:
        cfg.run.name = f"{names['model']}_{cfg.optim.name}_{cfg.seed}"
    return cfg


def _methods() -> list[Config]:
    """The defaults with each of the schemas that `optim` may have."""
    return [Config(optim=kind()) for kind in SCHEMAS["optim"].values()]


def _fill(
    cfg: Config, values: dict[str, tuple[Any, str]], failed: set[str], folder: Path
) -> tuple[Config, list[str]]:
    """A copy of `cfg` with `values`, key -> (value, as typed), and a line for each that is no good in it."""
    cfg, failed, problems = copy.deepcopy(cfg), set(failed), []
    hints = leaves(cfg)
    for key, (value, typed) in values.items():
        try:
            if key not in hints:
                raise ValueError(elsewhere(key, folder))
            put(cfg, key, convert(_as_text(value, hints[key], typed), hints[key]))
        except ValueError as error:
            problems.append(f"{key}={show(typed)}: {error}")
            failed.add(key)
    texts = {key: typed for key, (_, typed) in values.items() if key in hints}
    problems += [_as_typed(line, cfg, texts) for line in cfg.check() if not _blind(line, failed, set(texts))]
    return cfg, problems


def _blind(line: str, failed: set[str], typed: set[str]) -> bool:
    """Whether a check judged what nobody asked for, because the value or option asked for was no good."""
    named = re.findall(r"(?<![\w.])([a-z][\w.]*)=", line)
    return any(key in failed or key.split(".")[0] in failed and key not in typed for key in named)


def _read(arg: str, known: list[str], folder: Path) -> tuple[str, Any]:
    """Key and value of one argument. Raises ValueError with the reason and the way out."""
    if not arg.strip():
        raise ValueError("an empty argument; write key=value")
    if arg.startswith("-"):
        raise ValueError("no such flag; there are --help and --cfg, everything else is key=value")
    if arg.startswith("~"):
        raise ValueError("nothing can be deleted; set a value, or null for the default")
    name, equals, typed = arg.partition("=")
    key = name.lstrip("+")
    if re.split(r"[./@]", key)[0] == "hydra":
        raise ValueError("Hydra's own settings are fixed; use run.dir and run.name for the folder of a run")
    if key not in known:
        inside = [k for k in known if k.startswith(f"{key}.")]
        hint = f"it is a section: set {', '.join(inside)}" if inside else nearest(key, known)
        raise ValueError(f"no such key; {hint or 'see --help for those there are'}")
    if not equals:
        raise ValueError(f"no '=' in it; write {key}=VALUE")
    if name != key and (name != f"++{key}" or key in GROUPS):
        raise ValueError(f"the key exists, nothing is added; write {key}={show(typed)}")
    if key in NAMED_BY_GROUP:
        raise ValueError(f"chosen with its group; write {NAMED_BY_GROUP[key]}={show(typed)}")
    if not typed.strip():
        raise ValueError("an empty value; give one or leave the key out")
    value = _value(name, typed)
    if key in GROUPS:
        return key, _option(key, value, folder)
    return key, value


@cache
def _grammar() -> OverridesParser:
    return OverridesParser.create()


def _value(name: str, typed: str) -> Any:
    """What Hydra's override grammar reads: int, float, bool, None, text, list or dict."""
    try:
        override = _grammar().parse_override(f"{name}={typed}")
        if override.is_sweep_override():
            raise ValueError("a sweep, and one command is one run; for a list write [a,b]")
        return override.value()
    except HydraException as error:
        reason = show(str(error).split("\n")[0])
        raise ValueError(
            f"cannot be read ({reason}); put the value in quotes inside quotes: '\"...\"'"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply; write a plain value") from None


def _option(group: str, value: Any, folder: Path) -> str | None:
    options = group_options(group, folder)
    if value is None and group == "experiment" or value in options:
        return value
    hint = nearest(value, options) if isinstance(value, str) else ""
    raise ValueError(f"no such option; {hint + ' ' if hint else ''}there are {', '.join(options)}")


def _as_text(value: Any, hint: Any, typed: str) -> Any:
    """A name that reads as a number stays the text it is: `run.name=007` or `1e3`."""
    wants_text = hint in (str, str | None) or hint is Any
    return typed.strip() if wants_text and isinstance(value, int | float) else value


def _as_typed(line: str, cfg: Config, texts: dict[str, str]) -> str:
    """The same line with each value spelled as on the command line: 1e3 for 1000.0."""
    for key, typed in texts.items():
        head = f"{key}={get(cfg, key)}"
        if line.startswith(head + ":"):
            return f"{key}={show(typed)}{line[len(head) :]}"
        if line.startswith(f"{key}=") and typed not in line:
            return f"{show(line)} (given: {key}={show(typed)})"
    return show(line) if not line.isprintable() else line


@lru_cache(64)
def _compose(choices: tuple[tuple[str, str], ...], folder: Path) -> tuple[Config, dict[str, str]]:
    """Config of the group files and the option taken for each group. Callers change copies only."""
    register()
    overrides = [f"{group}={option}" for group, option in choices if option is not None]
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3", job_name="train"):
            tree = compose("config", overrides, return_hydra_config=True)
        names = dict(tree.hydra.runtime.choices)
        with open_dict(tree):
            del tree["hydra"]
        cfg = OmegaConf.to_object(tree)
        assert isinstance(cfg, Config)
        return cfg, names
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_file_problems(error, dict(choices), folder)) from None


def _file_problems(error: Exception, choices: dict[str, str], folder: Path) -> list[str]:
    """Lines for group files that do not compose: each bad key and value in them, else Hydra's own words."""
    found = []
    for group, option in choices.items():
        path = folder / group / f"{option}.yaml"
        try:
            values = read_yaml(path)
        except ConfigError as unreadable:
            found += unreadable.problems
            continue
        base = values.pop("defaults", None)
        keyed = values if group == "experiment" else {f"{group}.{k}": v for k, v in values.items()}
        overrides = {k: v for entry in base or () if isinstance(entry, dict) for k, v in entry.items()}
        method = choices.get("optim") or overrides.get("override /optim")
        cfg = blank(method, folder) if method in group_options("optim", folder) else Config()
        found += [f"{path}: {line}" for line in apply(cfg, keyed, lambda key: elsewhere(key, folder))]
    return found or [f"{folder}: cannot be composed: {show(' '.join(str(error).split()))}"]


def answer(argv: list[str]) -> str | None:
    """What to print instead of running: the help for -h and --help, the composed values for --cfg [job].

    None when `argv` asks for neither. Raises ConfigError as `parse` does.
    """
    if {"-h", "--help"} & set(argv):
        return help_text()
    kept = list(argv)
    for i, arg in enumerate(argv):
        if arg in ("--cfg", "--cfg=job"):
            followed = arg == "--cfg" and argv[i + 1 : i + 2] == ["job"]
            kept[i : i + 1 + followed] = []
            cfg = parse(kept)
            # Shapes that come from init_from are read later, and what depends on them stays null.
            return to_yaml(cfg if cfg.model.init_from else cfg.resolved())
    return None


def main(argv: list[str]) -> int:
    """Checks a command line without running it; returns the exit code."""
    try:
        text = answer(argv)
        if text is None:
            parse(argv)
            text = "ok"
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(text.rstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
