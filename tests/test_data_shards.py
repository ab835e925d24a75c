"""Token shards: written, checked, read in a shuffled order that is arithmetic."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DamageLimit, DataConfig, DataError, Tokenizer, build, prepare, shards
from data.files import Damage
from data.source import Source

pytestmark = pytest.mark.usefixtures("small_groups")

ROOT = Path(__file__).parents[1]
SEQ = 16


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.integers(1, 70), st.integers(71, 40000)), st.tuples(st.integers(0, 99), st.integers(0, 9))
)
def test_permute_is_a_bijection(size, key):
    out = shards.permute(np.arange(size), size, key)
    assert out.dtype == np.int64 and np.array_equal(np.sort(out), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1 << 40), st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_permute_computes_any_part_alone(size, index):
    index = np.array(index) % size
    out = shards.permute(index, size, (1, 2))
    assert ((0 <= out) & (out < size)).all()
    assert [int(shards.permute(index[i : i + 1], size, (1, 2))[0]) for i in range(len(index))] == out.tolist()


def test_permute_depends_on_its_key_and_mixes():
    a, b = (shards.permute(np.arange(10000), 10000, (0, epoch)) for epoch in (0, 1))
    assert (a == b).sum() < 20 and (a == np.arange(10000)).sum() < 20
    assert abs(np.corrcoef(a, np.arange(10000))[0, 1]) < 0.05
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.05


def text(name, count):
    return [
        f"{name} {i}: " + "the tree by the river and the house on the hill. " * (i % 7) for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of texts, prepared folder with several small shards)."""
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 90), ("b", 40), ("v", 20)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in text(name, count))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_TOKENS", 2000)
        prepare.prepare(local(folder), folder / "out", 320)
    return folder, folder / "out"


def local(folder, packing="dense"):
    train = [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    return DataConfig("local", train, f"{folder}/v.jsonl", packing, cache=str(folder / "cache"), workers=0)


def tokens_of(out, **settings):
    return build(DataConfig("tokens", str(out), **settings), vocab_size=320, seq_len=SEQ, seed=4)


def test_prepare_writes_the_documents_in_order(made):
    folder, out = made
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = Tokenizer(out / "tokenizer.model")
    assert (
        meta["dtype"] == "<u2" and meta["vocab_size"] == 320 and meta["tokenizer_sha256"] == tokenizer.sha256
    )
    assert len(meta["splits"]["train"]) > 2
    files = Source([str(folder / "a.jsonl"), str(folder / "b.jsonl")])
    documents = [[*tokenizer.encode(t), tokenizer.eos_id] for t in files.documents(Damage())]
    read = shards.Shards(out, "train")
    assert read.documents == len(documents) and read.tokens == sum(map(len, documents))
    assert [read.document(i).tolist() for i in range(read.documents)] == documents
    assert read.read(0, read.tokens).tolist() == sum(documents, [])
    assert read.read(1990, 50).tolist() == sum(documents, [])[1990:2040]  # over a border


@pytest.mark.parametrize("packing", ["dense", "paper"])
def test_evaluation_is_that_of_the_text(made, packing):
    folder, out = made
    from_text = build(local(folder, packing), vocab_size=320, seq_len=SEQ, seed=0)
    border = sum(len(from_text.tokenizer.encode(t)) + 1 for t in text("v", 3))
    for limit in (border - 1, border, border + 1, 10**7):
        a = from_text.validation(limit)
        assert a.tokens == limit or limit == 10**7
        for more in ({}, {"validation": str(out)}):
            b = tokens_of(out, packing=packing, **more).validation(limit)
            assert a.x.equal(b.x) and a.y.equal(b.y)
            assert (a.tokens, a.bytes, a.unigram_ppl) == (b.tokens, b.bytes, b.unigram_ppl)


def rows_by_hand(documents, eos, pad, limit):
    """x, y as lists with one document a row, up to the row that holds target `limit`."""
    xs, ys, scored = [], [], 0
    for document in documents:
        if scored < limit:
            row = [*document[: SEQ - 1], eos]
            targets = row[1:][: limit - scored]
            scored += len(targets)
            xs.append(row + [pad] * (SEQ - len(row)))
            ys.append(targets + [-100] * (SEQ - len(targets)))
    return xs, ys


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_evaluation_of_one_document_a_row(made, kind):
    folder, out = made
    cfg = local(folder, "paper") if kind == "text" else DataConfig("tokens", str(out), packing="paper")
    data = build(cfg, vocab_size=320, seq_len=SEQ, seed=0)
    tokenizer = data.tokenizer
    documents = [tokenizer.encode(t) for t in text("v", 20)]
    sizes = [len(d) for d in documents]
    assert min(sizes) < SEQ - 1 < max(sizes) and tokenizer.pad_id != tokenizer.eos_id
    for limit in (1, 37, sum(min(n, SEQ - 1) for n in sizes[:3]), 10**7):  # the third ends with a document
        scored = data.validation(limit)
        xs, ys = rows_by_hand(documents, tokenizer.eos_id, tokenizer.pad_id, limit)
        assert scored.x.tolist() == xs and scored.y.tolist() == ys
        targets = [t for row in ys for t in row if t != -100]
        assert scored.tokens == len(targets) == int((scored.y != -100).sum())
        assert scored.tokens == limit or len(xs) == len(documents)
        assert scored.bytes == sum(int(tokenizer.byte_lengths[t]) for t in targets)
        shares = [targets.count(t) / len(targets) for t in set(targets)]
        assert scored.unigram_ppl == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
        assert data.validation(limit) is scored


def collect(data, rows, steps, world=1, state=None):
    """x, y of the global rows, and the position after them."""
    loaders = [data.loader(rows, rank, world, state) for rank in range(world)]
    try:
        taken = [next(one) for _ in range(steps) for one in loaders]
    finally:
        for one in loaders:
            one.close()
    return (
        np.concatenate([b.x.numpy() for b in taken]),
        np.concatenate([b.y.numpy() for b in taken]),
        taken[-1].state,
    )


@pytest.mark.parametrize("packing", ["dense", "paper"])
def test_an_epoch_has_every_row_once(made, packing):
    read, data = shards.Shards(made[1], "train"), tokens_of(made[1], packing=packing)
    eos, pad = data.tokenizer.eos_id, data.tokenizer.pad_id
    if packing == "dense":
        stream = read.read(0, read.tokens).tolist()
        count = (len(stream) - 1) // SEQ
        expected = [
            (stream[i * SEQ : i * SEQ + SEQ], stream[i * SEQ + 1 : i * SEQ + SEQ + 1]) for i in range(count)
        ]
    else:
        documents = [read.document(i).tolist()[:-1][: SEQ - 1] + [eos] for i in range(read.documents)]
        count = len(documents)
        blank = [SEQ - len(d) for d in documents]
        expected = [(d + [pad] * b, d[1:] + [-100] * (b + 1)) for d, b in zip(documents, blank, strict=True)]
    x, y, state = collect(data, count, 2)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    assert sorted(pairs[:count]) == sorted(pairs[count:]) == sorted(expected)
    assert pairs[:count] != pairs[count:] and pairs[:count] != expected
    assert state["epoch"] == 2 and state["row"] == 0


@pytest.mark.parametrize("packing", ["dense", "paper"])
def test_any_stops_and_ranks_give_the_same_rows(made, packing):
    data = tokens_of(made[1], packing=packing)
    x, y, _ = collect(data, 60, 12)

    @settings(max_examples=10, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1, 5), st.sampled_from((1, 2, 3)), st.sampled_from((6, 60))), max_size=3
        )
    )
    def check(stops):
        state, row = None, 0
        for steps, world, rows in stops:
            state = json.loads(json.dumps(state)) if state else None
            a, b, state = collect(data, rows, steps, world, state)
            n = max(0, min(len(a), len(x) - row))
            assert np.array_equal(a[:n], x[row : row + n]) and np.array_equal(b[:n], y[row : row + n])
            row += len(a)

    check()


def test_a_position_belongs_to_its_rows(made):
    state = collect(tokens_of(made[1]), 6, 1)[2]
    other = build(DataConfig("tokens", str(made[1])), vocab_size=320, seq_len=SEQ * 2, seed=4)
    with pytest.raises(DataError, match="seq_len=32: .*16"):
        other.loader(6, state=state)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def change(path):
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "train_00001.bin": (cut, "bytes, meta.json says"),
    "train_00000.bin": (change, "was altered"),
    "train_00000.idx": (change, "was altered"),
    "train_00002.idx": (Path.unlink, "is missing"),
    "validation_00000.bin": (cut, "bytes, meta.json says"),
    "tokenizer.model": (lambda path: path.write_bytes(b"x"), "not a SentencePiece model"),
    "meta.json": (cut, "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_the_run(made, tmp_path, name):
    shutil.copytree(made[1], tmp_path / "out")
    harm, reason = DAMAGE[name]
    harm(tmp_path / "out" / name)
    with pytest.raises(DataError, match=reason) as error:
        tokens_of(tmp_path / "out")
    assert name in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("data.")


def test_tokens_outside_the_vocabulary_stop_a_run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "VERIFY_BYTES", 0)  # as for a set too large to hash at the start
    shutil.copytree(made[1], tmp_path / "out")
    path = tmp_path / "out" / "train_00000.bin"
    path.write_bytes(b"\xff\xff" * (path.stat().st_size // 2))
    with (
        tokens_of(tmp_path / "out").loader(300) as batches,
        pytest.raises(DamageLimit, match="token 65535 .* 320"),
    ):
        next(batches)


def test_folders_that_cannot_be_read(made, tmp_path):
    for value, reason in (
        (str(tmp_path), "no meta.json"),
        ("/no/such", "not one folder"),
        ([1, 2], "not a name"),
    ):
        with pytest.raises(DataError, match=reason):
            tokens_of(value) if isinstance(value, str) else build(
                DataConfig("tokens", value), vocab_size=320, seq_len=SEQ, seed=0
            )
    with pytest.raises(DataError, match="320 pieces do not fit model.vocab_size=319"):
        build(DataConfig("tokens", str(made[1])), vocab_size=319, seq_len=SEQ, seed=0)
    with pytest.raises(DataError, match="do not fill one row of seq_len=99999"):
        build(DataConfig("tokens", str(made[1])), vocab_size=320, seq_len=99999, seed=0)


def test_prepare_overwrites_nothing_but_its_own_unfinished_work(made, tmp_path):
    folder, out = made
    with pytest.raises(DataError, match="out=.*: holds prepared tokens already"):
        prepare.prepare(local(folder), out, 320)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="out=.*: holds other files .thesis.txt"):
        prepare.prepare(local(folder), tmp_path, 320)
    unfinished = tmp_path / "new"
    shutil.copytree(out, unfinished)
    (unfinished / "meta.json").unlink()
    prepare.prepare(local(folder), unfinished, 320)
    assert not (unfinished / "train_00002.bin").exists()  # one large shard this time
    assert shards.Shards(unfinished, "train").tokens == shards.Shards(out, "train").tokens


def test_the_command(made, tmp_path):
    folder, _ = made
    arguments = [
        "data=local",
        f"data.train=[{folder}/a.jsonl,{folder}/b.jsonl]",
        f"data.validation={folder}/v.jsonl",
    ]
    arguments += [f"data.cache={folder}/cache", "vocab_size=320", f"out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training and" in done.stdout and "M tokens/s" in done.stderr
    assert collect(tokens_of(tmp_path / "out"), 6, 1)[0].shape == (6, SEQ)


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["data=pile", "out=x"], "data=pile: no such source"),
        (["data=local", "data.trian=a", "out=x"], "data.trian=a: no such key here"),
        (["train=a", "out=x"], "train=a: no such key here"),
        (["data=sample"], "out=: no folder"),
        (["data=sample", "out=x", "vocab_size=many"], "vocab_size=many: not a whole number"),
        (["data=sample", "out=x", "data.workers=-1"], "data.workers=-1: not a whole number"),
        (["data=sample", "out=x", "fast"], "fast: not key=value"),
        (["data=tokens", "data.train=x", "out=x"], "data=tokens: is what this command writes"),
        (["data=local", "data.train=/no/*.txt", "data.validation=/no/v.txt", "out={}"], "data.train=/no/"),
        (["data=sample", "out=/dev/null/x"], "out=/dev/null"),
    ],
)
def test_wrong_command_lines_end_in_one_line(arguments, line, capsys, tmp_path):
    assert prepare.main([a.format(tmp_path / "out") for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(line) and "\n" not in error
