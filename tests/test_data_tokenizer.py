import io
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from data import DataConfig, DataError, Tokenizer, build, tokenizer
from data.source import Source

TEXT = "".join(
    f"The {a} sees the {b}, {i} times.\n\n" for i in range(40) for a in ("cat", "dog") for b in ("hen", "fox")
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "t.txt").write_text(TEXT)
    (folder / "v.txt").write_text("The owl sees the hen. " * 9)
    return folder


@pytest.fixture(scope="module")
def trained(files):
    return Tokenizer(tokenizer.trained(Source([str(files / "t.txt")]), 330, files / "cache"))


def data(files, vocab_size=330, cache="cache", **settings):
    cfg = DataConfig(
        "local", f"{files}/t.txt", f"{files}/v.txt", cache=str(files / cache), workers=0, **settings
    )
    return build(cfg, vocab_size=vocab_size, seq_len=16, seed=0)


# But U+2581, which SentencePiece itself uses for a space, and half surrogates, which no reader lets through.
anything = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.one_of(anything, st.text(" \n\tTheca.t1", max_size=40)))
def test_round_trip_and_bytes(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.byte_lengths[ids].sum() == len(text.encode())
    (batch,) = trained.encode_batch([text])
    assert batch.tolist() == ids and batch.dtype == np.int32


def test_special_pieces(trained):
    assert (trained.eos_id, trained.pad_id, trained.vocab_size) == (2, 3, 330)
    assert trained.byte_lengths.dtype == np.int32 and trained.byte_lengths.shape == (330,)
    assert trained.byte_lengths[:4].tolist() == [0, 0, 0, 0]
    # text is never taken for control pieces
    assert not {0, 1, 2, 3} & set(trained.encode("</s> <s> <pad> <unk>"))
    ids = trained.encode("The cat")
    assert trained.decode([1, *ids, 2, 3, 330, 99999, -1]) == "The cat"


def test_training_is_deterministic_and_cached(files, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "subspan"):
        first = data(files, cache="one").tokenizer
    assert "training a tokenizer of 330 pieces on 0.0 MB (about 1 s)" in caplog.text
    assert data(files, cache="two").tokenizer.path.read_bytes() == first.path.read_bytes()
    monkeypatch.setattr(tokenizer, "train_model", lambda *_: pytest.fail("trained again"))
    assert data(files, cache="one").tokenizer.sha256 == first.sha256
    assert [p.name for p in (files / "one" / "tokenizers").iterdir()] == [
        first.path.name
    ]  # nothing half-written


def test_the_cache_knows_size_and_content(files, tmp_path):
    source = Source([str(files / "t.txt")])
    paths = {tokenizer.trained(source, size, tmp_path) for size in (320, 330)}
    (tmp_path / "t.txt").write_text(TEXT + "One more line.\n")
    paths.add(tokenizer.trained(Source([str(tmp_path / "t.txt")]), 330, tmp_path))
    assert len(paths) == 3 and all(p.is_file() for p in paths)


def test_only_the_beginning_of_the_text_is_used(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAIN_BYTES", len(TEXT.strip()))
    (tmp_path / "t.txt").write_text("owl " * 9000)
    both = Source([str(files / "t.txt"), str(tmp_path / "t.txt")])
    assert tokenizer.trained(both, 330, tmp_path).name == tokenizer.trained(
        Source([str(files / "t.txt")]), 330, tmp_path
    ).name  # fmt: skip


def test_long_lines_are_trained_on(tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(TEXT.split()) * 3)  # one line past SentencePiece's limit
    assert Tokenizer(tokenizer.trained(Source([str(tmp_path / "t.txt")]), 330, tmp_path)).vocab_size == 330
    sentences = list(tokenizer._sentences([b"word " * 2000, b"a\nb"]))
    assert "".join(sentences) == "word " * 2000 + "ab" and max(map(len, sentences)) <= 4192


@pytest.mark.parametrize("size", [100, 3000])
def test_text_and_vocabulary_that_do_not_fit(files, size):
    with pytest.raises(DataError, match=f"model.vocab_size={size}: .* data.tokenizer=FILE"):
        data(files, vocab_size=size)


def test_a_file_of_ones_own(files, trained):
    # smaller than the model's vocabulary is fine
    assert data(files, 5000, tokenizer=str(trained.path)).tokenizer.sha256 == trained.sha256
    with pytest.raises(DataError, match=r"data.tokenizer=.*330 pieces do not fit model.vocab_size=329; set"):
        data(files, 329, tokenizer=str(trained.path))
    with pytest.raises(DataError, match="data.tokenizer=/no/such.model: no such file"):
        data(files, tokenizer="/no/such.model")
    for content in (b"", b"not a model"):
        (files / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match="data.tokenizer=.*bad.model: not a SentencePiece model"):
            data(files, tokenizer=str(files / "bad.model"))


def test_a_cache_that_cannot_be_written(files):
    with pytest.raises(DataError, match="data.cache=.*/v.txt: a tokenizer cannot be kept there"):
        data(files, cache="v.txt")


def model(**settings):
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=out, vocab_size=36, minloglevel=2, **settings
    )
    return out.getvalue()


def test_models_of_the_t5_kind(tmp_path):
    (tmp_path / "t5.model").write_bytes(model(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    t5 = Tokenizer(tmp_path / "t5.model")
    assert (t5.pad_id, t5.eos_id) == (0, 1)
    assert t5.byte_lengths[t5.encode("The cat")].sum() == len(" The cat")  # its own leading space is one byte
    (tmp_path / "llama.model").write_bytes(model(model_type="bpe"))  # no padding piece
    assert Tokenizer(tmp_path / "llama.model").pad_id == 0
    (tmp_path / "none.model").write_bytes(model(model_type="bpe", eos_id=-1))
    with pytest.raises(DataError, match="no end-of-text piece"):
        Tokenizer(tmp_path / "none.model")


def test_evaluation_scores_every_token_once(files, trained):
    found = data(files, tokenizer=str(trained.path))
    tokens = [*trained.encode((files / "v.txt").read_text()), trained.eos_id]
    scored = found.validation()
    x, y = scored.x.ravel().tolist(), scored.y.ravel().tolist()
    n = len(tokens) - 1
    assert scored.tokens == n and x[:n] == tokens[:-1] and y[:n] == tokens[1:]
    assert set(x[n:]) <= {trained.pad_id} and set(y[n:]) <= {-100} and len(x) - n < 16
    first = trained.byte_lengths[tokens[0]]
    assert scored.bytes == len((files / "v.txt").read_bytes()) - first
    counts = np.array([tokens[1:].count(t) for t in set(tokens[1:])])
    assert scored.unigram_ppl == pytest.approx(np.exp(-(counts / n * np.log(counts / n)).sum()))
    few = found.validation(max_tokens=10)
    assert few.tokens == 10 and few.y.ravel()[:10].tolist() == tokens[1:11]
    assert found.validation() is scored


@pytest.mark.parametrize("packing", ["dense", "paper"])
def test_no_text_to_evaluate_on(files, tmp_path, packing):
    empty = tmp_path / "v.txt"
    empty.write_text("\n \n")
    cfg = DataConfig("local", f"{files}/t.txt", str(empty), packing, cache=str(files / "cache"), workers=0)
    with pytest.raises(DataError, match="data.validation=.*: holds no text to evaluate on"):
        build(cfg, vocab_size=330, seq_len=16, seed=0).validation()
