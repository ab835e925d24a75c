"""Adapters from differences: what PEFT would read, added to the weights; errors as told; mistakes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import checkpoint, extract
from llama.model import ModelConfig, build_model
from llama.pretrained import write_config
from tests.mutants import kills
from tests.tiny import state_text

SHAPES = ModelConfig(
    vocab_size=256, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
)


def folder(path, change=None, seed=0):
    """A model folder; change(name, weight) is added to its matrices."""
    path.mkdir(parents=True)
    state = build_model(SHAPES, "cpu", torch.float32, seed).state_dict()
    for name, w in state.items():
        if change and extract.is_matrix(name):
            w += change(name, w)
    write_config(SHAPES, path, dtype=torch.float32)
    save_file({k: w.contiguous() for k, w in state.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def low(rank):
    """Random changes of this rank."""
    g = torch.Generator().manual_seed(1)
    return lambda name, w: (
        0.1 * (torch.randn(w.shape[0], rank, generator=g) @ torch.randn(rank, w.shape[1], generator=g))
    )


def added(base, adapter):
    """Weights with the adapter, as PEFT merges it: W + lora_alpha / r B A."""
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert told["peft_type"] == "LORA" and not told["fan_in_fan_out"] and told["bias"] == "none"
    state, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in state:
        parts = [f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight" for x in "BA"]
        if name.split(".")[-2] in told["target_modules"]:
            b, a = (factors.pop(p) for p in parts)
            assert b.dtype == torch.float32 and a.shape == (told["r"], state[name].shape[1])
            state[name] = state[name] + told["lora_alpha"] / told["r"] * b @ a
    assert not factors, "nothing but the matrices"
    return state


@kills("llama/extract.py", "d = b - a", "d = a - b")
@kills("llama/extract.py", "u[:, :rank] * root, root[:, None]", "u[:, :rank], root[:, None]")
@kills("llama/extract.py", '"lora_alpha": rank', '"lora_alpha": 2 * rank')
@kills("llama/extract.py", '.lora_A.weight"] = right', '.lora_A.weight"] = left.t()')
def test_a_change_of_low_rank_is_kept_whole(tmp_path, capsys):
    base, trained = folder(tmp_path / "base"), folder(tmp_path / "trained", low(3))
    assert extract.main([str(base), str(trained), "3", str(tmp_path / "out")]) == 0
    state = load_file(trained / "model.safetensors")
    for name, w in added(base, tmp_path / "out").items():
        torch.testing.assert_close(w, state[name], rtol=0, atol=2e-6)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 14 + 1 + 1 and "the 14 matrices together" in said[-2]
    assert all(line.endswith(" 0.0%") for line in said[1:-1])


@kills("llama/extract.py", "return self.lost / self.size if", "return self.lost if")
@kills("llama/extract.py", "d - left.double() @ right.double()", "d - left.double() @ right.double() * 0.99")
@kills("llama/extract.py", "sum(x * x for x in xs) ** 0.5", "sum(x for x in xs)")
def test_what_a_lower_rank_loses_is_told(tmp_path, capsys):
    """Half of a singular value spectrum: the errors are those of the best matrix of the rank."""
    base, trained = folder(tmp_path / "base"), folder(tmp_path / "trained", low(6), seed=1)
    a, b = (load_file(f / "model.safetensors") for f in (base, trained))
    assert extract.main([str(base), str(trained), "4", str(tmp_path / "out")]) == 0
    said = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    lost, size = 0.0, 0.0
    for name in a:
        d = b[name] - a[name]
        if extract.is_matrix(name):
            s = torch.linalg.svdvals(d.double()).square()
            lost, size = lost + s[4:].sum(), size + s.sum()
            assert float(said[name][0]) == pytest.approx(float(d.norm()), rel=1e-3)
            share = 100 * float((s[4:].sum() / s.sum()).sqrt())
            assert float(said[name][1].rstrip("%")) == pytest.approx(share, abs=0.051)
        else:
            assert (name in said) == bool(d.any()) and said.get(name, ["", "100.0%"])[1] == "100.0%"
    assert float(said["the"][-1].rstrip("%")) == pytest.approx(100 * float(lost / size) ** 0.5, abs=0.051)
    assert "and" in said and "model.embed_tokens.weight" in said


def test_a_run_and_its_save_are_folders_too(tmp_path):
    """Between two saves of one run; nothing changed is an adapter of zeros."""
    for step, change in ((2, None), (4, low(2))):
        made = folder(tmp_path / f"made{step}", change)
        tensors = {"model.safetensors": load_file(made / "model.safetensors"), "optim.safetensors": {}}
        texts = {
            "config.json": (made / "config.json").read_text(),
            "state.json": state_text(SHAPES, step, 2048),
        }
        checkpoint.write(tmp_path / "run", step, tensors, texts, keep_last=9)
    first = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert extract.main([str(first), str(tmp_path / "run"), "2", str(tmp_path / "out")]) == 0
    state = load_file(tmp_path / "made4" / "model.safetensors")
    for name, w in added(first, tmp_path / "out").items():
        torch.testing.assert_close(w, state[name], rtol=0, atol=2e-6)
    assert extract.main([str(first), str(tmp_path / "made2"), "2", str(tmp_path / "zeros")]) == 0
    assert not any(t.any() for k, t in load_file(tmp_path / "zeros" / "adapter_model.safetensors").items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["base", "trained", "2"], "usage:"),
        (["base", "trained", "0", "out"], "usage:"),
        (["base", "trained", "x", "out"], "usage:"),
        (["base", "trained", "33", "out"], "rank 33: above the width of model.layers.0."),
        (["base", "none", "2", "out"], "none: no such folder"),
        (["base", "other", "2", "out"], "other: a model of other shapes than base"),
        (["base", "trained", "2", "base"], "base: exists and is not empty"),
        (["base", "nan", "2", "out"], "nan: model.layers.0."),
    ],
)
def test_mistakes_are_one_clear_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base"), folder(tmp_path / "trained", low(2))
    folder(tmp_path / "nan", lambda name, w: w * float("nan"))
    config = json.loads((folder(tmp_path / "other") / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.05}))
    assert extract.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
