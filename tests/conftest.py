"""Fixtures: a small corpus of random English words, a command line that trains a very small model on it."""

import json
import os
import random

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# Two test processes on two cores; also keeps CPU sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402 - after the variables above

torch.set_num_threads(1)

from data import pack  # noqa: E402
from data.source import Source  # noqa: E402
from data.tokenizer import trained  # noqa: E402
from tests.hub import C4, LLAMA, T5, StandIn, c4, digests, layout, quick, shard  # noqa: E402
from tests.hub import TEXTS as C4_TEXTS  # noqa: E402


@pytest.fixture(scope="module")
def small_groups():
    """Dense rows mixed over 256 tokens, not a million: a small corpus is not read a hundred times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "GROUP_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def undrawn():
    """loss.png is not drawn: as much time as six steps of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.metrics.draw", lambda run: None)
        yield


WORDS = (
    "the of and to in a is that it was for on are as with his they at be this from have or by one had not "
    "but what all were when we there can an your which their said if do will each about how up out them then "
    "she many some so these would other into has more her two like him see time could no make than first "
    "been its who now people my made over did down only way find use may water long little very after words "
    "called just where most know congress union peace treasury government states constitution liberty "
    "commerce nation"
).split()


def documents(n, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice((3, 20, 60, 200)))) + "." for _ in range(n)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with train-0.jsonl, train-1.jsonl and validation.jsonl, documents of very unequal lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, n, seed in (("train-0", 150, 0), ("train-1", 90, 1), ("validation", 25, 2)):
        lines = [json.dumps({"text": text}) for text in documents(n, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def command(corpus):
    """command(run_dir, *overrides): arguments of train.py for 6 steps of 8 sequences in 4 micro-batches."""

    def arguments(run_dir, *overrides):
        given = {
            "model": "llama_tiny",
            "model.hidden_size": 32,
            "model.intermediate_size": 64,
            "model.num_hidden_layers": 2,
            "model.num_attention_heads": 2,
            "model.vocab_size": 384,
            "data": "local",
            "data.train": f"{corpus}/train-*.jsonl",
            "data.validation": f"{corpus}/validation.jsonl",
            "data.cache": f"{corpus}/cache",
            "data.workers": 0,
            "steps": 6,
            "tokens_per_step": 256,
            "micro_batch": 2,
            "seq_len": 32,
            "eval_every": 3,
            "save_every": 100,
            "run.dir": run_dir,
            "run.name": "r",
        }
        given |= dict(o.split("=", 1) for o in overrides)
        return [f"{k}={v}" for k, v in given.items()]

    return arguments


@pytest.fixture(scope="session")
def c4_model(tmp_path_factory):
    """A SentencePiece file of 300 pieces for the small C4 of tests/hub.py."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "t.jsonl").write_bytes(shard(C4_TEXTS["train"][0]))
    return trained(Source([str(folder / "t.jsonl")]), 300, folder)


@pytest.fixture(scope="module")
def c4_oracle(c4_model, small_groups, tmp_path_factory):
    """packing -> digests of 60 batches of the same files in a folder."""
    folder = tmp_path_factory.mktemp("oracle")
    for name, content in layout().items():
        (folder / name).write_bytes(content)
    settings = dict(path=str(folder), tokenizer=str(c4_model))
    return {packing: digests(c4(folder, packing=packing, **settings)) for packing in ("dense", "paper")}


@pytest.fixture
def stand_in(c4_model, monkeypatch, tmp_path):
    """The hub, with a small C4 and both tokenizers."""
    found = StandIn()
    found.add(C4, {f"en/{name}": content for name, content in layout().items()})
    found.add(C4, {"en/c4.py": b"raise SystemExit", "en.noblocklist/c4-train.x.json": b"x"})
    found.add(T5, {"spiece.model": c4_model.read_bytes(), "config.json": b"{}"})
    found.add(LLAMA, {"tokenizer.model": c4_model.read_bytes()})
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    quick(monkeypatch)
    yield found
    found.close()
