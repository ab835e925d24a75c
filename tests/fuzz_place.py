"""The small model, corpus and run that tests/fuzz.py works on, beside folders and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=384)


class Place:
    """Corpus, tokens, a run of two steps, and what is none of these, in one folder."""

    def __init__(self, folder: Path) -> None:
        from data.prepare import main as prepare
        from tests.kills import corpus_in

        self.folder, self.runs, self.new = folder, folder / "runs", folder / "new"
        self.new.mkdir()
        corpus_in(folder)
        (folder / "empty").mkdir()
        (folder / "zero.model").touch()
        (folder / "text.bin").write_text("x\n")
        self.tokens = folder / "tokens"
        self.models = broken_models(folder / "models")
        self.base = {
            "model": "llama_tiny",
            **{f"model.{k}": v for k, v in SHAPE.items()},
            "data": "local",
            "data.train": f"{folder}/train.jsonl",
            "data.validation": f"{folder}/validation.jsonl",
            "data.cache": f"{folder}/cache",
            "data.workers": 0,
            "steps": 2,
            "tokens_per_step": 64,
            "micro_batch": 2,
            "seq_len": 16,
            "run.dir": self.runs,
            "run.name": "r",
        }
        given = [f"{k}={self.base[k]}" for k in ("data", "data.train", "data.validation", "data.cache")]
        prepared = prepare([*given, f"out={self.tokens}", "vocab_size=384"])
        assert prepared == 0
        broken = folder / "broken_tokens"
        broken.mkdir()
        (broken / "meta.json").write_text('{"version": 1')

    def line(self, *args: str, without: tuple[str, ...] = (), **run: str) -> list[str]:
        """The base with `args` in place of its arguments with the same keys."""
        keys = {arg.partition("=")[0].lstrip("+~") for arg in args}
        if "data" in keys:
            keys |= {"data.train", "data.validation"}
        given = self.base | {f"run.{k}": v for k, v in run.items()}
        return [f"{k}={v}" for k, v in given.items() if k not in keys and k not in without] + list(args)


def broken_models(folder: Path) -> dict[str, str]:
    """Folders for model.init_from that are no model: path -> what the refusal names."""
    good = {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6} | SHAPE
    texts = {
        "none": None,
        "no_json": "{",
        "list": "[]",
        "deep": "[" * 100_000,
        "digits": '{"hidden_size": ' + "9" * 5000 + "}",
        "gpt2": json.dumps(good | {"model_type": "gpt2"}),
        "no_size": json.dumps({k: v for k, v in good.items() if k != "hidden_size"}),
        "text_size": json.dumps(good | {"hidden_size": "32"}),
        "half_size": json.dumps(good | {"hidden_size": 32.5}),
        "list_theta": json.dumps(good | {"rope_theta": [1]}),
        "list_rope": json.dumps(good | {"rope_parameters": [1]}),
        "text_tied": json.dumps(good | {"tie_word_embeddings": "no"}),
        "negative": json.dumps(good | {"num_hidden_layers": -2}),
        "gelu": json.dumps(good | {"hidden_act": "gelu"}),
        "no_weights": json.dumps(good),
        "pickled": json.dumps(good),
        "garbage": json.dumps(good),
        "elsewhere": json.dumps(good),
    }
    for name, text in texts.items():
        (folder / name).mkdir(parents=True)
        if text is not None:
            (folder / name / "config.json").write_text(text)
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "garbage" / "model.safetensors").write_bytes(b"\xff" * 64)
    index = {"weight_map": {"a": "../garbage/model.safetensors"}}
    (folder / "elsewhere" / "model.safetensors.index.json").write_text(json.dumps(index))
    return {str(folder / name): name for name in texts}
