import subprocess
import sys
from pathlib import Path

import pytest

from data import DataConfig

WRONG = [
    (dict(name="pile"), "data=pile:"),
    (dict(name="sample", packing="tight"), "data.packing=tight:"),
    (dict(name="local", validation="v.txt"), "data.train=null:"),
    (dict(name="local", train="t.txt"), "data.validation=null:"),
    (dict(name="tokens"), "data.train=null:"),
    (dict(name="local", train=3, validation="v.txt"), "data.train=3:"),
    (dict(name="local", train=["a", 3], validation="v.txt"), "data.train=['a', 3]:"),
    (dict(name="local", train="", validation="v.txt"), "data.train=:"),
    (dict(name="local", train="t.txt", validation=[]), "data.validation=[]:"),
    (dict(name="sample", workers=-1), "data.workers=-1:"),
    (dict(name="sample", workers=100000), "data.workers=100000:"),
    (dict(name="sample", workers=True), "data.workers=True:"),
    (dict(name="sample", workers="two"), "data.workers=two:"),
    (dict(name="sample", tokenizer=5), "data.tokenizer=5:"),
    (dict(name="sample", cache=""), "data.cache=:"),
    (dict(name="sample", train="t.txt"), "data.train=t.txt: would be ignored"),
    (dict(name="sample", validation="t.txt"), "data.validation=t.txt: would be ignored"),
    (dict(name="sample", path="/c4"), "data.path=/c4: would be ignored"),
    (dict(name="sample", cache_gib=3.0), "data.cache_gib=3.0: would be ignored"),
    (dict(name="c4", path="/c4", cache_gib=3.0), "data.cache_gib=3.0: would be ignored"),
    (dict(name="c4", cache_gib=0), "data.cache_gib=0:"),
    (dict(name="c4", cache_gib=float("nan")), "data.cache_gib=nan:"),
    (dict(name="c4", cache_gib=True), "data.cache_gib=True:"),
    (dict(name="c4", cache_gib="20"), "data.cache_gib=20:"),
    (dict(name="c4", path="hf://datasets/allenai/c4"), "data.path=hf://datasets/allenai/c4:"),
    (dict(name="c4", path="https://"), "data.path=https://:"),
    (dict(name="c4", path="http://[x"), "data.path=http://[x:"),
    (dict(name="c4", train="t.txt"), "data.train=t.txt: would be ignored"),
    (dict(name="local", train="t.txt", validation="v.txt", path="/c4"), "data.path=/c4: would be ignored"),
    (dict(name="tokens", train="f", tokenizer="t5"), "data.tokenizer=t5: would be ignored"),
    (dict(name="tokens", train="f", workers=2), "data.workers=2: would be ignored"),
]


@pytest.mark.parametrize("settings,start", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_each_problem_is_one_line_with_key_value_and_way_out(settings, start):
    problems = DataConfig(**settings).problems()
    assert len(problems) == 1 and problems[0].startswith(start)
    assert "\n" not in problems[0] and ";" in problems[0]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(name="c4", path="/c4", tokenizer="train"),
        dict(name="c4", path="https://mirror.example/hub", cache_gib=1.5),
        dict(name="sample", workers=0, packing="paper", cache="/tmp/x"),
        dict(name="local", train=["a.txt", "b.txt"], validation="v.txt", tokenizer="m.model", workers=2),
        dict(name="tokens", train="folder", workers=0),
        dict(name="tokens", train="folder", validation="other"),
    ],
)
def test_what_works_has_no_problems(settings):
    assert DataConfig(**settings).problems() == []


def test_all_problems_at_once():
    assert len(DataConfig(name="local", packing="x", workers=-1).problems()) == 4


def test_configuration_imports_neither_torch_nor_the_readers():
    for module, unwanted in (("config", {"torch", "numpy", "pyarrow"}), ("worker", {"torch", "pyarrow"})):
        code = f"import data.{module}, sys; sys.exit(bool({unwanted} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
