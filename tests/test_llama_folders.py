"""Model folders: exported, loaded by transformers, and back, bit for bit; text from a run; mistakes."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from data import Tokenizer
from llama import checkpoint
from llama import export as exporting
from llama import generate as generation
from llama.generate import generate
from llama.model import ModelConfig, build_model, empty_model
from llama.pretrained import FolderError, config_text, load_config, load_model, load_weights, write_config
from tests.tiny import state_text

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "gqa_theta": {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "gqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "padded": {"pad": True},
}


def shape(name="plain"):
    common = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    return ModelConfig(**common, num_attention_heads=4, **VARIANTS[name])


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer_file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    words = [
        "quick brown fox",
        "lazy dogs",
        "it is 1984 again",
        "two  spaces",
        "jumps over a line",
        "naive text",
    ]
    lines = [f"{a} and {b}, {c}." for a in words for b in words for c in words]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=310, minloglevel=2,
        model_type=request.param, byte_fallback=True, remove_extra_whitespaces=False, hard_vocab_limit=False,
        normalization_rule_name="identity", split_digits=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def make_run(tmp_path, tokenizer_file):
    """A run folder with one checkpoint."""

    def make(cfg, dtype=torch.float32):
        run = tmp_path / "run"
        run.mkdir()
        model = build_model(cfg, "cpu", dtype, 5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)
        tensors = {"model.safetensors": dict(model.state_dict()), "optim.safetensors": {}}
        config = config_text(cfg, dtype=dtype, eos_token_id=1, pad_token_id=0, seq_len=16)
        texts = {"config.json": config, checkpoint.STATE: state_text(cfg, 2, 16)}
        checkpoint.write(run, 2, tensors, texts, keep_last=1)
        shutil.copyfile(tokenizer_file, run / "tokenizer.model")
        return SimpleNamespace(run=run, model=model, out=tmp_path / "out")

    return make


def assert_same_weights(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_export_to_transformers_and_back_bit_for_bit(make_run, tmp_path, capsys, name, dtype):
    cfg = shape(name)
    made = make_run(cfg, dtype)
    assert exporting.main([str(made.run), str(made.out)]) == 0
    assert f"done: {made.out}" in capsys.readouterr().out
    hf = transformers.LlamaForCausalLM.from_pretrained(made.out)  # dtype from the folder
    assert hf.dtype == dtype and hf.config.rope_parameters["rope_theta"] == cfg.rope_theta
    ours = made.model.state_dict()
    theirs = {k: v for k, v in hf.state_dict().items() if k in ours}
    assert_same_weights(ours, {k: theirs[k] for k in ours})
    hf.save_pretrained(tmp_path / "back")
    for folder in (made.out, tmp_path / "back"):
        assert load_config(folder) == ModelConfig(
            **{**vars(cfg), "num_key_value_heads": cfg.kv_heads, "pad": None}
        )
        assert_same_weights(load_model(folder, "cpu").state_dict(), ours)
    assert not list(tmp_path.glob("*.tmp"))


def test_exported_tokenizer_gives_the_same_ids(make_run, tokenizer_file):
    made = make_run(shape())
    assert exporting.main([str(made.run), str(made.out)]) == 0
    ours, theirs = Tokenizer(tokenizer_file), transformers.AutoTokenizer.from_pretrained(made.out)
    fragments = "".join(
        random.Random(0).choices(["qui", "row", "ov", "nai", "azy", "dog", "er ", "ck", "n"], k=400)
    )
    for text in (exporting.TEXT, "lazy  dogs jumps\nover 1984", fragments, ""):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == 1 and theirs.pad_token_id == 0
    assert (made.out / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert len({path.stat().st_mode for path in made.out.iterdir()}) == 1  # whoever reads one file reads all


def test_export_that_does_not_agree_leaves_nothing(make_run, capsys, monkeypatch):
    made = make_run(shape())
    written = exporting.write_folder

    def damage(model, out, *rest):
        verdict = written(model, out, *rest)
        state = load_file(out / "model.safetensors")
        state["model.layers.1.mlp.up_proj.weight"][3] *= 1.01
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        return verdict

    monkeypatch.setattr(exporting, "write_folder", damage)
    assert exporting.main([str(made.run), str(made.out)]) == 2
    printed = capsys.readouterr()
    assert "logits differ" in printed.err and "done" not in printed.out
    assert not made.out.exists() and not list(made.out.parent.glob("*.tmp"))


def test_export_refuses_a_full_folder_and_a_missing_library(make_run, capsys, monkeypatch):
    made = make_run(shape())
    made.out.mkdir()
    (made.out / "precious").write_text("x")
    assert exporting.main([str(made.run), str(made.out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in made.out.iterdir()] == ["precious"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert exporting.main([str(made.run), str(made.out / "new")]) == 2
    assert "transformers is not installed" in capsys.readouterr().err


def test_export_refuses_another_models_tokenizer(make_run, capsys):
    made = make_run(ModelConfig(**{**vars(shape()), "vocab_size": 256}))
    assert exporting.main([str(made.run), str(made.out)]) == 2
    assert "the model has 256" in capsys.readouterr().err and not made.out.exists()


@pytest.fixture
def folder(tmp_path):
    model = build_model(shape(), "cpu", torch.float32, 0)
    write_config(shape(), tmp_path, dtype=torch.float32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shards_load_like_one_file(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {0: "model-00001-of-00002.safetensors", 1: "model-00002-of-00002.safetensors"}
    where = {key: names[i % 2] for i, key in enumerate(state)}
    for shard in names.values():
        save_file({k: v for k, v in state.items() if where[k] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_weights(
        dict(sorted(load_model(folder, "cpu").state_dict().items())), dict(sorted(state.items()))
    )
    (folder / names[1]).unlink()
    with pytest.raises(FolderError, match="model-00002-of-00002.safetensors: no such file"):
        load_model(folder, "cpu")


def test_weights_are_cast_to_the_models_dtype(folder):
    model = load_model(folder, "cpu", torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[name].bfloat16()) for name, p in model.named_parameters())


def test_leftovers_of_older_files_are_skipped(tmp_path):
    cfg = shape("tied")
    model = build_model(cfg, "cpu", torch.float32, 0)
    state = dict(model.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    fresh = empty_model(cfg, "cpu", torch.float32)
    load_weights(fresh, tmp_path)
    assert_same_weights(fresh.state_dict(), model.state_dict())
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FolderError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_weights(fresh, tmp_path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda s: s.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight has shape \(3,\), the model's",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(folder, damage, words):
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, folder / "model.safetensors")
    model = build_model(shape(), "cpu", torch.float32, 9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FolderError, match=words):
        load_weights(model, folder)
    assert_same_weights(model.state_dict(), before)


def test_pickles_and_damaged_files_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FolderError, match="cannot be read as safetensors"):
        load_model(folder, "cpu")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match="only pickled weights"):
        load_model(folder, "cpu")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FolderError, match="model.safetensors: no such file"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_size": "large"}, "wrong type"),
    ],
)
def test_config_that_cannot_be_expressed_is_refused(folder, changes, words):
    rewrite(folder, **changes)
    with pytest.raises(FolderError, match=words):
        load_config(folder)


def test_older_configs_hold_theta_by_itself(folder):
    rewrite(folder, rope_parameters=None, rope_theta=123.0)
    assert load_config(folder).rope_theta == 123.0


def test_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read as JSON"):
        load_config(folder)


def test_generate_repeats_stops_and_keeps_to_its_window(tokenizer_file):
    tokenizer, model = Tokenizer(tokenizer_file), build_model(shape(), "cpu", torch.float32, 5)
    seen = []
    model.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    text = generate(model, tokenizer, "lazy dogs", tokens=12, seed=1, window=8)
    assert text.startswith("lazy dogs") and len(seen) == 12 and max(seen) == 8
    assert text == generate(model, tokenizer, "lazy dogs", tokens=12, seed=1, window=8)
    assert text != generate(model, tokenizer, "lazy dogs", tokens=12, seed=2, window=8)
    greedy = [generate(model, tokenizer, "", tokens=6, temperature=0, seed=s) for s in (1, 2)]
    one = generate(model, tokenizer, "", tokens=6, top_k=1, temperature=5.0)
    assert greedy[0] == greedy[1] == one
    seen.clear()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits: the largest is the first
    tokenizer.eos_id = 0
    assert generate(model, tokenizer, "lazy dogs", tokens=5, temperature=0) == "lazy dogs" and len(seen) == 1


def test_generate_command(make_run, capsys):
    made = make_run(shape())
    assert generation.main([str(made.run), "quick brown", "tokens=5", "seed=3"]) == 0
    printed = capsys.readouterr().out
    tokenizer = Tokenizer(made.run / "tokenizer.model")
    assert printed == generate(made.model, tokenizer, "quick brown", tokens=5, seed=3, window=16) + "\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tokens=0"], "tokens=0: give a whole number from 1"),
        (["tokens=many"], "tokens=many"),
        (["temperature=nan"], "temperature=nan"),
        (["top_k=-1"], "top_k=-1"),
        (["colour=red"], "colour=red: not an option"),
    ],
)
def test_generate_command_answers_mistakes(capsys, arguments, words):
    assert generation.main(["nowhere", "x", *arguments]) == 2
    assert words in capsys.readouterr().err
