"""Group files: the options that a command line chooses among, and the schema that each of them fills."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
GROUPS = {
    "model": "size and shapes",
    "optim": "optimizer",
    "data": "text to learn from",
    "activations": "what is kept for backward",
    "experiment": "recipe: selects groups and sizes",
}


def group_options(group: str, folder: Path = FOLDER) -> list[str]:
    """Names that `group=NAME` takes: the files of its folder, models by size."""

    def size(name: str) -> tuple[float, str]:
        found = re.search(r"_(\d+)([mb])$", name)
        return (float(found[1]) * (1000 if found[2] == "b" else 1) if found else 0.0, name)

    return sorted((path.stem for path in (folder / group).glob("*.yaml")), key=size)


def group_schema(group: str, option: str, folder: Path = FOLDER) -> str:
    """Name of the schema that the option's file opens with; empty if it names none."""
    text = (folder / group / f"{option}.yaml").read_text(encoding="utf-8", errors="replace")
    found = re.search(rf"/schema/{group}/(\w+)@_here_", text)
    return found[1] if found else ""
