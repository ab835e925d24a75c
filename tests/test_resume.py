"""Going on with changed settings: the table of the README, each row; what is refused, with the way out."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from configs.resume import MAY_CHANGE, may_change, way_out
from llama import checkpoint, metrics
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups", "undrawn")

GALORE = ("optim=galore", "optim.rank=8", "optim.refresh_every=4", "optim.lr=0.003")


@pytest.fixture(scope="module")
def began(command, tmp_path_factory):
    """A galore run of 4 steps, to be copied."""
    folder = tmp_path_factory.mktemp("began")
    assert train.main(command(folder, "steps=4", *GALORE)) == 0
    return folder


@pytest.fixture
def go_on(began, command, tmp_path, capfd):
    """go_on(*changes): (exit code, what it said) of two more steps with them."""

    def run(*changes):
        shutil.copytree(began, tmp_path, dirs_exist_ok=True)
        code = train.main(command(tmp_path, "steps=6", *GALORE, *changes))
        return code, capfd.readouterr().err

    return run


ACCEPTED = {
    "eval_every=2": "",
    "save_every=2": "",
    "save_minutes=5": "",
    "keep_last=3": "",
    "spike=skip": "",
    "deterministic=true": "",
    "profile=true": "",
    "compile=off": "",
    "micro_batch=4": "",
    "data.workers=1": "",
    "optim.lr=0.001": "",
    "optim.scale=0.5": "",
    "optim.warmup=0.5": "",
    "optim.schedule=linear": "",
    "optim.min_lr_ratio=0.5": "",
    "optim.beta1=0.8": "",
    "optim.beta2=0.95": "",
    "optim.eps=1e-6": "",
    "optim.decay=0.1": "",
    "optim.clip=1": "",
    "optim.clip_mode=per_layer": "optim.clip=1",
    "optim.growth_limit=1.5": "",
    "optim.update=after": "",
    "optim.moments=int8": "",
    "optim.moments=bf16": "",
    "optim.embed_moments=fp32": "optim.moments=int8",
    "optim.refresh_every=3": "",
    "optim.refresh=together": "",
    "optim.finder=svd": "",
    "optim.transport=reset": "",
    "optim.rounding=nearest": "",
    "optim.lift=deferred": "",
    "activations.checkpoint=0.5": "",
    "activations.recompute=down": "",
    "optim=galore_8bit": "",
}


def test_the_readme_names_what_may_change() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `steps"))
    named = set()
    for group in re.findall(r"`([a-z][^`]+)`", row.split("|")[1]):
        prefix = group.split()[0].rpartition(".")[0]
        named |= {k if "." in k or not prefix else f"{prefix}.{k}" for k in group.split()}
    several = {
        "data.cache": ("", "_gib"),
        "optim.beta": ("1", "2"),
        "optim.clip": ("", "_mode"),
        "optim.refresh": ("", "_every"),
    }
    accepted = {f"{k}{end}" for k in MAY_CHANGE for end in several.get(k, ("",))} - {"run."}
    assert named == accepted | {"run.dir"}


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_may_change_goes_on_and_is_said(go_on, change, tmp_path):
    code, said = go_on(*filter(None, [ACCEPTED[change]]), change)
    assert code == 0, said
    key, value = change.split("=")
    key = {"optim": "optim.name"}.get(key, key)
    value = {"true": "True", "1e-6": "1e-06"}.get(value, value)
    assert re.search(rf"changed   {re.escape(key)}={re.escape(value)}(\.0)?: was ", said), said
    rows = metrics.read(tmp_path / "r" / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all(r["skipped"] == 0 for r in rows if "loss" in r)
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "r"))["step"] == 6


REFUSED = {
    "tokens_per_step=512": "batch",
    "seq_len=16": "batch",
    "seed=1": "data order",
    "data.packing=paper": "data",
    "data.tokenizer=train": "tokenizer",
    "model.hidden_size=64": "shape",
    "model.rope_theta=5e5": "shape",
    "weights=bf16": "weights",
    "optim=adamw": "method",
    "optim=gradnormlorp": "method",
    "optim.rank=16": "rank",
    "optim.side=output": "side",
    "optim.share=false": "bases",
    "optim.basis_dtype=bf16": "bases",
    "optim=natural_galore": "method",
    "activations.layers=down": "what is kept",
}


@kills("train.py", "refused = [c for c in changes if not may_change(c)]", "refused = []")
@kills("train.py", '(folder / "config.yaml.tmp").write_text', '(folder / "config.yaml").write_text')
@pytest.mark.parametrize("change", REFUSED)
def test_what_the_state_depends_on_is_refused_with_the_way_out(began, command, capfd, change):
    before = (began / "r" / "config.yaml").read_bytes()
    given = [a for a in GALORE if not a.startswith("optim") or change[:6] not in ("optim=", "seed=1")]
    assert train.main(command(began, "steps=6", *given, change)) == 2
    said = capfd.readouterr().err
    key, value = change.split("=")
    shown = {"optim": "optim.name", "5e5": "500000.0", "false": "False"}
    assert f"{shown.get(key, key)}={shown.get(value, value)}: was " in said, said
    assert "run.name=NEW" in said and "Traceback" not in said
    assert ("model.init_from=" in said) == (not key.startswith("model."))
    assert (began / "r" / "config.yaml").read_bytes() == before


def test_the_way_out_works(began, command, tmp_path):
    """run.name=NEW model.init_from=SAVE: another method goes on from the weights."""
    source = checkpoint.latest(began / "r")
    args = [a for a in command(tmp_path, "steps=1", "optim.lr=1e-12") if not a.startswith("model")]
    args += ["optim=gradnormlorp", "optim.rank=8", f"model.init_from={source}"]
    args += [f"data.tokenizer={began}/r/tokenizer.model"]
    assert train.main(args) == 0
    after = load_file(checkpoint.latest(tmp_path / "r") / "model.safetensors")
    for name, w in load_file(source / "model.safetensors").items():
        torch.testing.assert_close(after[name], w, rtol=1e-5, atol=1e-7)


def test_a_twin_is_the_same_method() -> None:
    assert may_change("optim.name=galore_8bit: was galore") and may_change("optim.name=adamw: was adamw_8bit")
    assert not may_change("optim.name=galore: was gradnormlorp")
    assert may_change("optim.name=natural_galore_8bit: was natural_galore")
    assert may_change("optim.damping=2.0: was 1.0") and not may_change("optim.history=8: was 4")
    assert "init_from" in way_out("optim.rank=8: was 4", "x") and "init_from=" not in way_out(
        "model.hidden_size=8: was 4", "x"
    )
