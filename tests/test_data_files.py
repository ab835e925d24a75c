"""Every format and archive reads alike; damaged input is skipped, counted, named, and changes no other."""

import gzip
import json
import logging
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DamageLimit, DataConfig, DataError, build, source
from data.files import NAMED_DAMAGE, PIECE_BYTES, Damage, documents
from data.source import Cursor, Source, find

pytestmark = pytest.mark.usefixtures("small_groups")

TEXTS = [
    f"Document {i}, {'with a longer text, ' * (i % 5)}caf\u00e9 \U0001f333 and\nsecond line."
    for i in range(40)
]


def zst(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}


def lines(texts):
    return "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts).encode()


def parquet(texts, rows=10, **kwargs):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=rows, **kwargs)
    return sink.getvalue().to_pybytes()


CONTENT = {
    ".jsonl": lines(TEXTS),
    ".json": lines(TEXTS),
    "-array.json": json.dumps([{"text": t} for t in TEXTS], indent=1).encode(),
    ".parquet": parquet(TEXTS),
}


def read(path, start=0):
    damage = Damage()
    return [text for _, text in documents(str(path), start, damage)], damage


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_every_format_and_archive(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](CONTENT[kind]))
    texts, damage = read(path)
    assert texts == TEXTS and damage.damaged == 0 and damage.documents == 40
    for start in (1, 10, 39, 40):  # a record is its own number: what a position is made of
        assert read(path, start)[0] == TEXTS[start:]


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_archives_of_several_streams(tmp_path, packed):
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(b"".join(PACK[packed](lines(TEXTS[i : i + 10])) for i in range(0, 40, 10)))
    assert read(path)[0] == TEXTS


def test_text_is_cut_in_whole_paragraphs(tmp_path):
    paragraphs = [f"{i}: " + "word " * (200 + i) for i in range(60)]
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + "\n\n".join(paragraphs) + "\n")
    pieces, damage = read(path)
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs) and damage.damaged == 0
    assert all(PIECE_BYTES <= len(p.encode()) < 2 * PIECE_BYTES for p in pieces[:-1])
    assert read(path, 3)[0] == pieces[3:]


@pytest.mark.parametrize("line", ["word " * 20000, "\u6811" * 30000, "x" * 50000])
def test_a_text_without_paragraphs_or_lines_is_cut_too(tmp_path, line):
    path = tmp_path / "a.txt"
    path.write_text(line)
    pieces, damage = read(path)
    assert "".join(pieces) == line and damage.damaged == 0 and len(pieces) > 2


def test_documents_without_text_are_skipped_without_a_word(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["one", "", " \n ", "two"]) + b"\n\n")
    texts, damage = read(path)
    assert texts == ["one", "two"] and damage.damaged == 0


def broken_group():
    content = bytearray(parquet(TEXTS[:30], compression="none", use_dictionary=False))
    column = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(1).column(1)
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    return bytes(content)


GOOD = TEXTS[:12]
HEAD, TAIL = lines(GOOD[:5]), lines(GOOD[5:])
# name -> (file name, content, the documents that are whole, where the damage is named)
DAMAGE = {
    "corrupt line": ("b.jsonl", HEAD + b'{"text": "half\n' + TAIL, GOOD, ":6:"),
    "text missing": ("b.jsonl", HEAD + b'{"txt": "a"}\n' + TAIL, GOOD, ":6:"),
    "text not a string": ("b.json", HEAD + b'{"text": 5}\n' + TAIL, GOOD, ":6:"),
    "not an object": ("b.jsonl", HEAD + b'["text"]\n' + TAIL, GOOD, ":6:"),
    "nested too deep": ("b.jsonl", HEAD + b"[" * 100000 + b"\n" + TAIL, GOOD, ":6:"),
    "bad utf-8": ("b.jsonl", HEAD + b'{"text": "caf\xe9"}\n' + TAIL, GOOD, ":6:"),
    "half a surrogate": ("b.jsonl", HEAD + b'{"text": "\\ud800 x"}\n' + TAIL, GOOD, ":6:"),
    "bad utf-8 in an array": (
        "b.json",
        b"[" + b", ".join([*HEAD.split(b"\n")[:-1], b'{"text": "\xe9"}', *TAIL.split(b"\n")[:-1]]) + b"]",
        GOOD,
        ":6:",
    ),
    "array cut": ("b.json", b"[" + b", ".join(HEAD.split(b"\n")[:-1]) + b', {"text": "ha', GOOD[:5], ":6:"),
    "gz cut": ("b.jsonl.gz", gzip.compress(HEAD) + gzip.compress(TAIL)[:8], GOOD[:5], ":6:"),
    "gz followed by something": ("b.jsonl.gz", gzip.compress(HEAD + TAIL) + b"something", GOOD, ":13:"),
    "xz cut": ("b.jsonl.xz", lzma.compress(HEAD) + lzma.compress(TAIL)[:20], GOOD[:5], ":6:"),
    "zst cut": ("b.jsonl.zst", zst(HEAD) + zst(TAIL)[:8], GOOD[:5], ":6:"),
    "array in gz cut": (
        "b.json.gz",
        gzip.compress(b"[" + b",\n".join(HEAD.split(b"\n")[:-1]) + b",\n") + gzip.compress(TAIL)[:8],
        GOOD[:5],
        ":6:",
    ),
    "not gz at all": ("b.jsonl.gz", HEAD, [], ":1:"),
    "not xz at all": ("b.jsonl.xz", HEAD, [], ":1:"),
    "not zst at all": ("b.jsonl.zst", HEAD, [], ":1:"),
    "empty jsonl": ("b.jsonl", b"", [], "b.jsonl: empty"),
    "empty json": ("b.json", b"", [], "b.json: empty"),
    "empty txt": ("b.txt", b"", [], "b.txt: empty"),
    "empty gz": ("b.jsonl.gz", b"", [], "b.jsonl.gz: empty"),
    "empty xz": ("b.jsonl.xz", b"", [], "b.jsonl.xz"),
    "empty zst": ("b.jsonl.zst", b"", [], "b.jsonl.zst: empty"),
    "empty parquet": ("b.parquet", b"", [], "b.parquet:"),
    "parquet cut": ("b.parquet", parquet(TEXTS)[:-50], [], "b.parquet:"),
    "parquet without text": ("b.parquet", parquet(TEXTS).replace(b"text", b"txet"), [], 'no column "text"'),
    "parquet of numbers": ("b.parquet", parquet([1, 2, 3]), [], "is int64"),
    "parquet null": ("b.parquet", parquet([*GOOD[:5], None, *GOOD[5:]]), GOOD, ":6:"),
    "parquet group": ("b.parquet", broken_group(), TEXTS[:10] + TEXTS[20:30], ":11:"),
    "txt bad utf-8": ("b.txt", b"x\n" * 9000 + b"caf\xe9\n", ["x\n" * 8191 + "x"], ":9001:"),
    "txt cut": (
        "b.txt.gz",
        gzip.compress(b"y\n" * 8192 + b"half\na pie") + gzip.compress(b"ce")[:9],
        ["y\n" * 8191 + "y"],
        ":",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "t.jsonl").write_bytes(lines(TEXTS))
    (folder / "v.txt").write_text("A tree.")
    cfg = DataConfig("local", f"{folder}/t.jsonl", f"{folder}/v.txt", cache=str(folder), workers=0)
    return build(cfg, vocab_size=330, seq_len=8, seed=0).tokenizer.path


def rows(folder, model, validation, state=None, steps=12):
    cfg = DataConfig("local", f"{folder}/*", str(validation), tokenizer=str(model), workers=0)
    with build(cfg, vocab_size=330, seq_len=64, seed=3).loader(8, state=state) as batches:
        taken = [next(batches) for _ in range(steps)]
        return np.concatenate([b.x.numpy() for b in taken]), taken[steps // 3].state, batches.damaged


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_leaves_exactly_the_tokens_of_the_good_documents(tmp_path, case, model, monkeypatch, caplog):
    monkeypatch.setattr(source, "BLOCK_DOCUMENTS", 9)
    name, content, good, place = DAMAGE[case]
    bad, clean = tmp_path / "bad", tmp_path / "clean"
    for folder in (bad, clean):
        folder.mkdir()
        for other in ("a", "c"):
            (folder / f"{other}.jsonl").write_bytes(lines([f"{other} {t}" for t in TEXTS[20:35]]))
    (bad / name).write_bytes(content)
    if good:
        (clean / name.partition(".")[0]).with_suffix(".json").write_bytes(lines(good))
    validation = tmp_path / "v.txt"
    validation.write_text("A tree.")
    if good:  # the order goes by name
        monkeypatch.setattr(
            source.Source, "_order", lambda self, epoch: sorted(self.files, reverse=epoch % 2 == 1)
        )
    with caplog.at_level(logging.WARNING, "subspan"):
        x, state, damaged = rows(bad, model, validation)
    assert np.array_equal(x, rows(clean, model, validation)[0])
    texts, damage = read(bad / name)
    assert texts == good and damage.damaged == 1  # one place is counted once
    assert damaged >= 1 and place in caplog.text and name in caplog.text
    again = rows(bad, model, validation, state, 3)[0]
    assert np.array_equal(again, x[8 * 5 : 8 * 8])  # the damage does not shift a position either


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_an_archive_cut_anywhere_gives_the_documents_before_the_cut(tmp_path, packed):
    content = b"".join(PACK[packed](lines(TEXTS[i : i + 8])) for i in range(0, 40, 8))
    ends = [
        len(b"".join(PACK[packed](lines(TEXTS[i : i + 8])) for i in range(0, end, 8)))
        for end in range(8, 41, 8)
    ]
    path = tmp_path / f"a.jsonl{packed}"

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, len(content) - 1))
    def check(cut):
        path.write_bytes(content[:cut])
        texts, damage = read(path)
        whole = 8 * sum(end <= cut for end in ends)
        assert texts == TEXTS[: len(texts)] and whole <= len(texts) <= whole + 8
        assert damage.damaged in ((0, 1) if cut in ends else (1, 2))

    check()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.json", "a.parquet"]
)
def test_changed_bytes_never_stop_the_reader(tmp_path, name):
    kind = "-array.json" if name == "a.json" else "." + name.split(".")[1]
    content = PACK["." + name.split(".")[2] if name.count(".") > 1 else ""](CONTENT[kind])
    path = tmp_path / name

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=3))
    def check(changes):
        changed = bytearray(content)
        for at, flip in changes:
            changed[at] ^= flip
        path.write_bytes(bytes(changed))
        try:
            texts, _ = read(path)
        except DamageLimit:  # an array that is one no more: each of its lines is damaged
            return
        assert read(path)[0] == texts

    check()


def test_the_first_places_are_named_then_counts(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 100)
    with caplog.at_level(logging.WARNING, "subspan"):
        assert read(tmp_path / "a.jsonl")[1].damaged == 100
    assert f"a.jsonl:{NAMED_DAMAGE}:" in caplog.text and f"a.jsonl:{NAMED_DAMAGE + 1}:" not in caplog.text
    assert "100 places" in caplog.text and len(caplog.records) == NAMED_DAMAGE + 1


def test_too_much_damage_stops_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:9]) + b"{\n" * 101)
    with pytest.raises(DamageLimit, match=r"101 damaged places beside 9 good .*a\.jsonl:110 "):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(lines(["word"] * 20000) + b"{\n" * 200)  # 1% exactly
    assert read(tmp_path / "b.jsonl")[1].damaged == 200


def test_counts_go_on_over_a_resume_and_begin_anew_with_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_DOCUMENTS", 6)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:6]) + b"{\n" * 60 + lines(TEXTS[6:10]))
    files, damage = Source([str(tmp_path / "a.jsonl")]), Damage()
    blocks = files.blocks(Cursor(), damage)
    places = [next(blocks)[0] for _ in range(5)]
    assert [(p.epoch, p.documents, p.damaged) for p in places] == [
        (0, 0, 0),
        (0, 6, 0),
        (1, 0, 0),
        (1, 6, 0),
        (2, 0, 0),
    ]
    for place, counts in zip(places[1:3], ((10, 60), (6, 0)), strict=True):
        again = Damage()
        next(files.blocks(place, again))
        assert (again.documents, again.damaged) == counts


class FailingDisk:
    closed = False

    def fail(self, *_):
        raise OSError(5, "Input/output error")

    read = read1 = readinto = readline = __iter__ = fail

    def seek(self, *_):
        return 1000

    tell = seek

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_a_failing_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(CONTENT["." + name.split(".")[1]])

        monkeypatch.setattr("data.files.open_raw", lambda path: FailingDisk())
        with pytest.raises(OSError, match="Input/output error"):
            read(tmp_path / name)


def test_names_that_match_nothing_readable(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "sub").mkdir()
    for pattern, reason in (
        ("*.jsonl", "no file matches"),
        ("*.csv", "not a kind of file"),
        ("sub", "is a folder"),
    ):
        with pytest.raises(DataError, match=reason) as error:
            find("data.train", f"{tmp_path}/{pattern}")
        assert str(error.value).startswith(f"data.train={tmp_path}/{pattern}: ") and "\n" not in str(
            error.value
        )


def test_globs_lists_and_home(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find("data.train", ["~/*.jsonl", f"{tmp_path}/*.txt", "~/a.txt"])
    assert found == [str(tmp_path / n) for n in ("c.jsonl", "a.txt", "b.txt")]


def test_validation_files_are_not_training_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    cfg = DataConfig("local", f"{tmp_path}/*.txt", f"{tmp_path}/a.txt")
    with pytest.raises(DataError, match="data.validation=.*a.txt is in data.train too"):
        build(cfg, vocab_size=300, seq_len=8, seed=0)
