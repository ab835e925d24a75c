"""Evaluation is exact for every micro-batch and number of ranks; the command finds a run and its settings."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llama import eval as evaluation
from llama.eval import evaluate
from llama.model import ModelConfig, build_model

CFG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
)
LENGTHS = [
    5,
    12,
    2,
    9,
    11,
    3,
    7,
    12,
    1,
    8,
    4,
]  # tokens a document; one a row, padded: unequal numbers of targets


@pytest.fixture(scope="module")
def documents():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(CFG.vocab_size, (n + 1,), generator=g) for n in LENGTHS]


@pytest.fixture(scope="module")
def evalset(documents):
    x = torch.zeros(len(documents), 12, dtype=torch.int32)  # stored narrow: converted batch by batch
    y = torch.full((len(documents), 12), -100, dtype=torch.int32)
    for row, ids in enumerate(documents):
        x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
    return SimpleNamespace(x=x, y=y, tokens=sum(LENGTHS), bytes=4 * sum(LENGTHS) + 3, unigram_ppl=250.0)


@pytest.fixture(scope="module")
def model():
    model = build_model(CFG, "cpu", torch.float32, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    return model


@pytest.fixture(scope="module")
def exact(model, documents):
    wide = build_model(CFG, "cpu", torch.float64, 0)
    wide.load_state_dict(model.state_dict())
    total = 0.0
    for ids in documents:
        log_p = F.log_softmax(wide(ids[None, :-1])[0].detach(), dim=-1)
        total -= log_p.gather(1, ids[1:, None]).sum().item()
    return total


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 64])
def test_loss_does_not_depend_on_the_micro_batch(model, evalset, exact, micro_batch, train):
    model.train(train)
    result = evaluate(model, evalset, micro_batch, device="cpu")
    assert result["val_loss"] == pytest.approx(exact / evalset.tokens, rel=1e-6)
    assert result["val_ppl"] == pytest.approx(math.exp(exact / evalset.tokens), rel=1e-5)
    assert result["val_bpb"] == pytest.approx(exact / math.log(2) / evalset.bytes, rel=1e-6)
    assert model.training == train


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_ranks_together_score_every_token_once(model, evalset, exact, world, micro_batch):
    sums, calls = [], []

    def collect(total):
        sums.append(total.clone())
        return total

    shapes = model.register_forward_pre_hook(lambda m, args: calls.append(tuple(args[0].shape)))
    for rank in range(world):
        evaluate(model, evalset, micro_batch, rank=rank, world=world, all_sum=collect, device="cpu")
    shapes.remove()
    assert sum(sums).dtype == torch.float64
    assert sum(sums).item() == pytest.approx(exact, rel=1e-6)
    assert (
        set(calls) == {(micro_batch, 12)} and len(calls) % world == 0
    )  # one shape, equally many on each rank
    others = sum(sums)
    result = evaluate(
        model, evalset, micro_batch, rank=1, world=world, all_sum=lambda t: others, device="cpu"
    )
    assert result["val_loss"] == pytest.approx(exact / evalset.tokens, rel=1e-6)


def test_overwhelming_loss_is_infinite_perplexity_not_an_error(evalset):
    result = evaluate(lambda x, y: torch.tensor(1e9), evalset, 4, device="cpu")
    assert result["val_ppl"] == math.inf


@pytest.fixture
def command(monkeypatch, tmp_path, model, evalset):
    """A run folder and stand-ins for the packages that read text and settings."""
    from dataclasses import dataclass, field

    from safetensors.torch import save_file

    from llama.pretrained import write_config

    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    write_config(CFG, folder, dtype=torch.float32, eos_token_id=1)
    save_file(model.state_dict(), folder / "model.safetensors")
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"")
    (tmp_path / "run" / "config.yaml").write_text("run")

    @dataclass
    class Data:
        name: str = "sample"
        train: str | None = None
        validation: str | None = None
        tokenizer: str | None = None

    @dataclass
    class Config:
        data: Data = field(default_factory=Data)
        micro_batch: int = 3
        seq_len: int = 12
        seed: int = 0

    class Error(ValueError):
        pass

    asked = []

    def parse(argv):
        asked.append(argv)
        return Config(
            Data(**{k.removeprefix("data."): v for k, v in (a.split("=") for a in argv) if k != "data"})
        )

    def build(data, **kw):
        asked.append((data, kw))
        if data.validation == "bad":
            raise Error("data.validation=bad: no file matches")
        return SimpleNamespace(validation=lambda: evalset)

    schema = ModuleType("configs.schema")
    vars(schema).update(
        parse=parse, from_yaml=lambda path: Config(Data(validation="saved")), ConfigError=Error
    )
    import configs

    monkeypatch.setattr(configs, "schema", schema, raising=False)
    monkeypatch.setitem(sys.modules, "configs.schema", schema)
    data_module = ModuleType("data")
    vars(data_module).update(build=build, DataError=Error)
    monkeypatch.setitem(sys.modules, "data", data_module)
    checkpoint = ModuleType("llama.checkpoint")
    vars(checkpoint).update(latest=lambda run: max((run / "checkpoints").glob("step_*"), default=None))
    monkeypatch.setitem(sys.modules, "llama.checkpoint", checkpoint)
    return SimpleNamespace(run=tmp_path / "run", folder=folder, asked=asked)


def test_command_prints_the_exact_numbers(command, exact, evalset, capsys):
    assert evaluation.main([str(command.run)]) == 0
    out = capsys.readouterr().out
    assert f"{exact / evalset.tokens:.4f}" in out and "250.0000" in out and f"{evalset.tokens}" in out
    data, keywords = command.asked[-1]
    assert data.validation == "saved" and data.tokenizer == str(command.run / "tokenizer.model")
    assert keywords == {"vocab_size": 300, "seq_len": 12, "seed": 0}


def test_command_overrides(command, capsys):
    assert evaluation.main([str(command.run), "data.validation=v.jsonl", "micro_batch=2"]) == 0
    assert command.asked[-1][0].validation == "v.jsonl"
    assert evaluation.main([str(command.run), "data=local", "data.validation=w.jsonl", "seq_len=12"]) == 0
    assert command.asked[-2] == ["data=local", "data.validation=w.jsonl", "data.train=w.jsonl"]
    assert command.asked[-1][0].validation == "w.jsonl"


def test_command_takes_a_model_folder(command, capsys):
    (command.folder / "tokenizer.model").write_bytes(b"")
    assert evaluation.main([str(command.folder), "data=local", "data.validation=w"]) == 0
    assert command.asked[-1][0].tokenizer == str(command.folder / "tokenizer.model")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "usage"),
        (["no_such_run"], "no_such_run: no such folder"),
        (["RUN", "steps=3"], "steps=3: not a setting"),
        (["RUN", "data.validation=bad"], "data.validation=bad: no file matches"),
        (["RUN", "micro_batch=0"], "micro_batch=0: must be at least 1"),
        (["RUN", "micro_batch=x"], "micro_batch=x"),
        (["RUN", "data.nonsense=1"], "nonsense"),
    ],
)
def test_command_answers_mistakes_with_one_line(command, capsys, arguments, words):
    assert evaluation.main([str(command.run) if a == "RUN" else a for a in arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_command_without_a_checkpoint(command, capsys):
    command.folder.rename(command.folder.with_name("other"))
    assert evaluation.main([str(command.run)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
