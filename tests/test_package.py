"""The wheel holds `subspan` alone, and all of it imports where nothing else of the project is."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imports every module of the installed package; run in a folder that has no `llama` or `data` of its own.
IMPORT_ALL = """
import importlib, pkgutil, subspan
found = [m.name for m in pkgutil.walk_packages(subspan.__path__, "subspan.")]
for name in found:
    importlib.import_module(name)
from subspan.llama.config import ModelConfig
assert ModelConfig().hidden_size == 512
print(len(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, so that the checkout stays clean."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.name in ("configs", "data", "kernels", "llama", "optim", "tests"):
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        copy,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("subspan-*.whl")
    return built


def test_the_only_top_level_name_is_subspan(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"subspan"}
    assert "subspan/llama/config.py" in names and "subspan/optim/rules/__init__.py" in names
    assert not [name for name in names if name.split("/")[1].startswith(("configs", "train", "tests"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site, clean = tmp_path / "site", tmp_path / "clean"
    clean.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{IMPORT_ALL}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7
