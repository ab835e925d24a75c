"""Who may import whom, and what a source file looks like, read from the syntax trees."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import kills, mutants

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data", "kernels", "llama", "optim")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SCHEMAS = {f"{package}.config" for package in ("data", "llama", "optim")}

# package -> packages it may import; `main()` of a command module may import data and configs as well.
ALLOWED = {"configs": set(), "data": set(), "kernels": set(), "llama": {"kernels"}, "optim": {"kernels"}}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    """(module, inside main()) of each import; relative ones made absolute."""
    package = list(path.relative_to(ROOT).parts[:-1])

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        inside = inside or isinstance(node, ast.FunctionDef) and node.name == "main"
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base if node.module else f"{base}.{a.name}".strip("."), inside) for a in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, False)


def forbidden(source: str, path: Path) -> list[str]:
    """Imports in `source`, read as the file `path`, that go against the direction of dependency."""
    package = path.relative_to(ROOT).parts[0]
    found = []
    for module, in_main in imports(ast.parse(source), path):
        top = module.split(".")[0]
        local = top in PACKAGES or top in ("train", "bench", "tests", "subspan")
        if not local or top == package or top in ALLOWED[package]:
            continue
        if package == "configs" and module in SCHEMAS or in_main and top in ("data", "configs"):
            continue
        found.append(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_follow_the_direction(path: Path) -> None:
    assert forbidden(path.read_text(), path) == []


def test_the_direction_is_enforced() -> None:
    llama, data, optim, configs = (ROOT / name / "x.py" for name in ("llama", "data", "optim", "configs"))
    assert forbidden("import optim", llama) and forbidden("from ..optim import attach", llama)
    assert forbidden("from .. import optim", llama) and forbidden(
        "def f():\n    from data import build", llama
    )
    assert not forbidden("def main():\n    from data import build\n    import configs.cli", llama)
    assert forbidden("def main():\n    import optim", llama) and forbidden("import train", llama)
    assert forbidden("from llama.model import Llama", configs) and not forbidden(
        "from llama.config import X", configs
    )
    assert forbidden("from llama import config", data) and not forbidden(
        "from .config import DataConfig", data
    )
    assert not forbidden("import kernels", optim) and not forbidden("from torch import optim", llama)


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name == "config.py" or p.parts[-2] == "configs"], ids=names
)
def test_configuration_imports_no_torch(path: Path) -> None:
    tops = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()), path)}
    assert not tops & {"torch", "transformers", "datasets", "triton", "safetensors"}


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_stay_small_plain_and_quiet(path: Path) -> None:
    source = path.read_text()
    assert source.isascii()
    assert len(source.splitlines()) <= 400
    tree = ast.parse(source)
    commands = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert commands, f"line {node.lineno}: only a command prints, a module uses logging"


def test_every_package_folder_is_in_the_wheel() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        str(p.parent.relative_to(ROOT)) for p in FILES if p.name == "__init__.py" and "configs" not in p.parts
    }
    assert tool["package-dir"] == {f"subspan.{folder.replace('/', '.')}": folder for folder in folders}
    assert set(tool["packages"]) == set(tool["package-dir"])


def test_every_mutant_names_one_place_in_the_source() -> None:
    """`make mutants` takes half an hour; that its changes still fit is seen here."""
    found = [m for path in sorted((ROOT / "tests").glob("test_*.py")) for m in mutants(path)]
    lost = [(m.test, m.old) for m in found if (ROOT / m.file).read_text().count(m.old) != 1]
    assert len(found) > 200 and not lost


@kills("optim/comm.py", "import sys\n", "import sys\nimport torch._dynamo\n")
@kills("optim/reduce.py", "import torch\n", "import torch\nimport torch.distributed.fsdp\n")
def test_a_line_is_refused_without_what_is_slow_to_import() -> None:
    """Dynamo and DTensors take as long as torch."""
    script = "import sys, train; print(train.main(['steps=-3']), {MODULES} & set(sys.modules))"
    script = script.replace("MODULES", "'torch._dynamo', 'torch.distributed.tensor'")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2 set()", done
