"""Evaluation is exact for every micro-batch and number of ranks; the command finds a run and its settings."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import data
from configs import cli, schema
from data.prepare import prepare
from llama import checkpoint
from llama import eval as evaluation
from llama.eval import evaluate
from llama.model import ModelConfig, build_model
from llama.pretrained import config_text
from tests.tiny import state_text

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
    # one shape, equally many on each rank
    assert set(calls) == {(micro_batch, 12)} and len(calls) % world == 0
    others = sum(sums)
    result = evaluate(
        model, evalset, micro_batch, rank=1, world=world, all_sum=lambda t: others, device="cpu"
    )
    assert result["val_loss"] == pytest.approx(exact / evalset.tokens, rel=1e-6)


def test_overwhelming_loss_is_infinite_perplexity_not_an_error(evalset):
    result = evaluate(lambda x, y: torch.tensor(1e9), evalset, 4, device="cpu")
    assert result["val_ppl"] == math.inf


TEXTS = ["the quick brown fox", "lazy dogs sleep", "it is 1984 again", "foxes jump over two lines"]


@pytest.fixture(scope="module")
def written(tmp_path_factory, model):
    """A run folder as training leaves it, and two files of text."""
    root = tmp_path_factory.mktemp("eval")
    for name, count in (("train", 40), ("held_out", 5), ("other", 3)):
        lines = [json.dumps({"text": f"{TEXTS[i % 4]} and {TEXTS[i * i % 3]}."}) for i in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(root / "tokenizer"), model_type="bpe",
        vocab_size=298, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, pad_id=3,
    )  # fmt: skip
    run = root / "run"
    run.mkdir()
    shutil.copyfile(root / "tokenizer.model", run / "tokenizer.model")
    files = [
        f"data.{key}={root}/{name}.jsonl" for key, name in (("train", "train"), ("validation", "held_out"))
    ]
    cfg = cli.parse(
        ["data=local", *files, "micro_batch=2", "seq_len=12", "tokens_per_step=48", "data.workers=0"]
    )
    (run / "config.yaml").write_text(schema.to_yaml(cfg))
    tensors = {"model.safetensors": dict(model.state_dict()), "optim.safetensors": {}}
    config = config_text(CFG, dtype=torch.float32, eos_token_id=2)
    texts = {"config.json": config, checkpoint.STATE: state_text(CFG, 2, 2048)}
    folder = checkpoint.write(run, 2, tensors, texts, keep_last=1)
    return SimpleNamespace(root=root, run=run, folder=folder)


def expected_nats(model, written, name):
    """Every token after the first, each from the tokens before it in its row of 12."""
    tokenizer = data.Tokenizer(written.run / "tokenizer.model")
    lines = (written.root / f"{name}.jsonl").read_text().splitlines()
    ids = torch.tensor([i for line in lines for i in [*tokenizer.encode(json.loads(line)["text"]), 2]])
    total = 0.0
    for start in range(0, len(ids) - 1, 12):
        row = ids[start : start + 13]
        log_p = F.log_softmax(model(row[None, :-1])[0].detach().double(), dim=-1)
        total -= log_p.gather(1, row[1:, None]).sum().item()
    return total / (len(ids) - 1)


def shown(out, label):
    (line,) = [line for line in out.splitlines() if line.startswith(label)]
    return float(line.removeprefix(label).split()[0])


def test_command_prints_the_exact_numbers(written, model, capsys):
    assert evaluation.main([str(written.run)]) == 0
    first = capsys.readouterr().out
    loss = expected_nats(model, written, "held_out")
    assert shown(first, "val loss") == pytest.approx(loss, rel=1e-6)
    assert shown(first, "perplexity") == pytest.approx(math.exp(loss), rel=1e-5)
    assert 1 < shown(first, "unigram") < CFG.vocab_size
    assert evaluation.main([str(written.run), "micro_batch=5"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == first.splitlines()[:2]


@pytest.mark.parametrize("fresh", [[], ["data=local"]])
def test_command_overrides(written, model, capsys, fresh):
    other = f"data.validation={written.root}/other.jsonl"
    assert evaluation.main([str(written.run), *fresh, other]) == 0
    loss = shown(capsys.readouterr().out, "val loss")
    assert loss == pytest.approx(expected_nats(model, written, "other"), rel=1e-6)


def test_command_takes_a_model_folder(written, model, tmp_path, capsys):
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(written.folder / file, tmp_path / file)
    arguments = [str(tmp_path), "data=local", f"data.validation={written.root}/other.jsonl", "seq_len=12"]
    assert evaluation.main(arguments) == 2
    assert "no tokenizer.model there" in capsys.readouterr().err
    shutil.copyfile(written.run / "tokenizer.model", tmp_path / "tokenizer.model")
    assert evaluation.main(arguments) == 0
    loss = shown(capsys.readouterr().out, "val loss")
    assert loss == pytest.approx(expected_nats(model, written, "other"), rel=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "usage"),
        (["no_such_run"], "no_such_run: no such folder"),
        (["RUN", "steps=3"], "steps=3: not a setting"),
        (["RUN", "data.validation=/no/such/file"], "data.validation=/no/such/file"),
        (["RUN", "data.validation="], "data.validation="),
        (["RUN", "micro_batch=0"], "micro_batch=0: give a whole number"),
        (["RUN", "seq_len=x"], "seq_len=x: give a whole number"),
        (["RUN", "data.nonsense=1"], "data.nonsense=1: no such key"),
        (["RUN", "data.packing=loose"], "data.packing=loose"),
        (["RUN", "data=nowhere"], "data=nowhere"),
    ],
)
def test_command_answers_mistakes_with_one_line(written, capsys, arguments, words):
    assert evaluation.main([str(written.run) if a == "RUN" else a for a in arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_command_reads_tokens_of_the_same_tokenizer_only(written, model, tmp_path, capsys):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(tmp_path / "another"), model_type="bpe",
        vocab_size=296, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, pad_id=3,
    )  # fmt: skip
    files = {"train": f"{written.root}/train.jsonl", "validation": f"{written.root}/other.jsonl"}
    for name, tokenizer in (("same", written.run / "tokenizer.model"), ("other", tmp_path / "another.model")):
        prepare(data.DataConfig("local", **files, tokenizer=str(tokenizer), workers=0), tmp_path / name, 300)
    assert evaluation.main([str(written.run), "data=tokens", f"data.train={tmp_path}/same"]) == 0
    loss = shown(capsys.readouterr().out, "val loss")
    assert loss == pytest.approx(expected_nats(model, written, "other"), rel=1e-6)
    assert evaluation.main([str(written.run), "data=tokens", f"data.train={tmp_path}/other"]) == 2
    assert "made with another tokenizer" in capsys.readouterr().err


def test_command_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoints" / "step_00000002.tmp").mkdir(parents=True)
    assert evaluation.main([str(tmp_path)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
