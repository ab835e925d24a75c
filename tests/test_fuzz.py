"""A little of tests/fuzz.py at every run of the tests: command lines and saves, mutated."""

import json
import logging
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train
from llama import checkpoint, pretrained
from llama.pretrained import FolderError, load_config, load_weights, misfit
from tests import fuzz, fuzz_saves, mutations
from tests.fuzz_place import Place
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups")


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_groups):
    """A run of two steps in place.runs / "r"."""
    found = Place(tmp_path_factory.mktemp("fuzz"))
    assert train.main(found.line()) == 0
    return found


@pytest.fixture(scope="module")
def went(command, tmp_path_factory, small_groups):
    """A run with saves at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("went")
    with fuzz_saves.every_save():
        assert train.main(command(folder, "save_every=2", "keep_last=9", "eval_every=100")) == 0
    return folder / "r"


@pytest.fixture
def cut(went, tmp_path):
    """Its saves at 2 and 4, to be mutated."""
    shutil.copytree(went, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/checkpoints/step_00000006")
    return tmp_path / "r"


def go_on(run, command, *more):
    return fuzz.call(command(run.parent, "save_every=2", "keep_last=9", "eval_every=100", *more))


def test_mutated_lines_are_refused_by_key_and_valid_ones_train(place):
    tally = fuzz.Tally()
    with fuzz.quick():
        fuzz.try_lines(place, 100, random.Random(3), tally)
    assert tally.tried.total() == 100 and not tally.failures, tally.failures


def test_mutated_saves_are_refused_or_make_no_difference(place, monkeypatch):
    monkeypatch.setattr(fuzz_saves, "METHODS", ("adamw", "galore_8bit"))
    monkeypatch.setattr(fuzz_saves, "COMMANDS", ("eval", "generate"))
    tally = fuzz.Tally()
    fuzz_saves.try_saves(place, 60, random.Random(1), tally)
    assert tally.tried.total() == 60 and not tally.failures, tally.failures


# ---- what it found


@kills("data/tokenizer.py", "    if not os.path.isfile(path):", "    if not path.is_file():")
@kills("data/loader.py", "not os.path.isdir(folder)", "not folder.is_dir()")
@pytest.mark.parametrize(
    "key", ["data.tokenizer", "data.cache", "data.train", "data.validation", "model.init_from"]
)
@pytest.mark.parametrize("value", ["x" * 5000, "x/" * 5000])
def test_a_path_that_no_file_system_takes_is_one_line(place, key, value):
    more = ["data=tokens"] if key == "data.train" else []
    end = fuzz.call(place.line(*more, f"{key}={value}", dir=str(place.new), name="n"))
    assert end.code == 2 and "Traceback" not in end.err
    assert f"{key}={value[:100]}" in end.err


@kills("train.py", 'and "can\'t allocate memory" not in str(e)', "and str(e)")
def test_a_model_beyond_the_host_memory_is_exit_code_4(place, monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    end = fuzz.call(place.line(dir=str(place.new), name="n"))
    assert end.code == 4 and "out of memory: " in end.err and "try micro_batch=1" in end.err


@kills("data/shards.py", "meta = read_meta(folder, key)", "meta = read_meta(folder)")
def test_a_broken_folder_of_validation_tokens_is_named_with_its_key(place):
    args = ["data=tokens", f"data.train={place.tokens}", f"data.validation={place.folder}/empty"]
    end = fuzz.call(place.line(*args, dir=str(place.new), name="n"))
    assert end.code == 2 and f"data.validation={place.folder}/empty: no meta.json" in end.err


@kills("train.py", "with named(cfg):\n                shapes", "with suppress():\n                shapes")
@kills("train.py", "with named(cfg):\n                pre", "with suppress():\n                pre")
@kills(
    "llama/pretrained.py",
    '{value!r}" for key, value in known.items() if type',
    '{value!r}" for key, value in () if type',
)
@pytest.mark.parametrize("name", ["text_size", "half_size", "list_theta", "no_weights", "elsewhere"])
def test_a_folder_that_is_no_model_is_named_with_the_key(place, name):
    path = place.folder / "models" / name
    end = fuzz.call(place.line(f"model.init_from={path}", dir=str(place.new), name="n"))
    assert end.code == 2 and f"model.init_from={path}: " in end.err


@kills("train.py", 'os.replace(folder / "config.yaml.tmp", folder / "config.yaml")', "None")
@kills("train.py", '.name) / "config.yaml.tmp").unlink()', '.name) / "config.yaml.tm").unlink()')
@kills(
    "train.py",
    "    return folder, None if cfg",
    '    os.replace(folder / "config.yaml.tmp", folder / "config.yaml")\n    return folder, None if cfg',
)
def test_data_that_is_refused_leaves_the_settings_of_the_run(place):
    run = place.runs / "r"
    before = fuzz.contents(run)
    assert "config.yaml" in before
    end = fuzz.call(place.line("steps=5", "data.validation=/no/such"))
    assert end.code == 2 and "data.validation=/no/such" in end.err
    assert fuzz.contents(run) == before


@kills("train.py", "        if checkpoint.complete(folder):\n", "        if False:\n")
def test_a_run_whose_saves_are_all_damaged_does_not_begin_anew(cut, command):
    for save in checkpoint.complete(cut):
        (save / "state.json").unlink()
    before = fuzz.contents(cut)
    end = go_on(cut, command)
    assert end.code == 2 and "no save in" in end.err and "state.json is missing" in end.err
    assert fuzz.contents(cut) == before


@kills("llama/checkpoint.py", "if path <= final]", "]")
def test_a_damaged_newer_save_does_not_push_out_the_new_ones(cut, command):
    """keep_last counts what was saved, not what was refused."""
    save = cut / "checkpoints/step_00000099"
    shutil.copytree(cut / "checkpoints/step_00000004", save)
    assert go_on(cut, command, "keep_last=1").code == 0
    assert checkpoint.latest(cut).name == "step_00000006"


@kills("llama/checkpoint.py", 'return f"{MANIFEST} is missing"', 'return ""')
def test_a_save_without_its_manifest_is_named(cut, caplog):
    (cut / "checkpoints/step_00000004/manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(cut).name == "step_00000002"
    assert "step_00000004 refused: manifest.json is missing" in caplog.text


@kills("llama/checkpoint.py", "type(step) is not int or step != step_of(path)", "type(step) is not int")
def test_a_save_under_the_name_of_another_step_is_refused(cut):
    shutil.copytree(cut / "checkpoints/step_00000002", cut / "checkpoints/step_00000005")
    assert "of step '2'" in checkpoint.damage(cut / "checkpoints/step_00000005")


@kills("optim/state.py", "        if not any(_kinds", "        if False and not any(_kinds")
@kills("optim/state.py", "if there.dtype != here.dtype and", "if False and")
@pytest.mark.parametrize("key", ["m", "t"])
def test_moments_in_another_type_are_refused_and_the_save_before_is_taken(cut, went, command, key):
    save = cut / "checkpoints/step_00000004"
    name = f"lm_head.weight:{key}"
    mutations.rewrite(save / "optim.safetensors", lambda t: t.update({name: t[name].half()}))
    mutations.rehash(save)
    end = go_on(cut, command)
    assert end.code == 0 and "step_00000004 refused: optim.safetensors: " in end.err
    for file in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(run / "checkpoints/step_00000006" / file) for run in (cut, went))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@kills(
    "llama/pretrained.py",
    "for n, s in stored.items() if s[2] != kind]",
    "for n, s in stored.items() if False]",
)
@kills("llama/pretrained.py", "not in (value, None):", "not in (value, None) and False:")
def test_weights_and_config_json_must_fit_each_other(cut):
    save = cut / "checkpoints/step_00000004"
    assert misfit(save) == ""
    mutations.rewrite(save / "model.safetensors", lambda t: t.update({k: x.half() for k, x in t.items()}))
    assert "is F16, config.json says F32" in misfit(save)
    content = json.loads((save / "config.json").read_text())
    (save / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.01}))
    assert misfit(save) == "config.json says rms_norm_eps=0.01, state.json 1e-06"


@kills("llama/pretrained.py", "if not tensor.isfinite().all():", "if False:")
def test_weights_that_are_not_finite_are_refused(cut):
    save = cut / "checkpoints/step_00000004"
    mutations.rewrite(save / "model.safetensors", lambda t: t["model.norm.weight"][3:].fill_(float("nan")))
    model = pretrained.empty_model(load_config(save), "cpu", torch.float32)
    with pytest.raises(FolderError, match="model.norm.weight holds numbers that are not finite"):
        load_weights(model, save)


@kills("llama/pretrained.py", ' and not (folder / "model.safetensors").is_file():', ":")
@kills("llama/pretrained.py", "Path(name).name != name", "False")
def test_an_index_leads_neither_past_the_weights_nor_out_of_the_folder(cut):
    save = cut / "checkpoints/step_00000004"
    index = save / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../step_00000002/model.safetensors"}}))
    assert pretrained.weight_files(save) == [save / "model.safetensors"]
    (save / "model.safetensors").unlink()
    with pytest.raises(FolderError, match="is no file of the folder"):
        pretrained.weight_files(save)


@kills("train.py", "            self.dataset.check_position(saved", "            len(saved")
@pytest.mark.parametrize("odd", [{"more": 1}, {"file": 99}, {"record": "1"}, {"epoch": -1}, {"row": 10**9}])
def test_a_position_that_cannot_be_is_refused(cut, command, odd):
    path = cut / "checkpoints/step_00000004/state.json"
    state = json.loads(path.read_text())
    state["data"] |= odd
    path.write_text(json.dumps(state))
    mutations.rehash(path.parent)
    end = go_on(cut, command)
    assert end.code == 0 and f"state.json: no position in this data ({next(iter(odd))}" in end.err
