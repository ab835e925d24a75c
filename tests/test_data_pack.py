import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pack import IGNORE, Dense, Mixed, Paper, groups

EOS, PAD = 2, 3
documents = st.lists(st.lists(st.integers(4, 99), min_size=1, max_size=30), min_size=1, max_size=8)


def stream(docs, first=0):
    """Documents with their end-of-text, over and over, with their running number."""
    numbered = enumerate(itertools.cycle(docs))
    return ((n, np.array([*d, EOS], np.int32)) for n, d in itertools.islice(numbered, first, None))


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_dense_is_the_joined_stream_cut_in_rows(docs, seq_len, takes):
    joined = np.concatenate([t for _, t in itertools.islice(stream(docs), 2000)])
    pack, row = Dense(stream(docs), seq_len), 0
    for rows in takes:
        x, y, document, token = pack.take(rows)
        for i in range(rows):
            begin = (row + i) * seq_len
            assert (x[i] == joined[begin : begin + seq_len]).all()
            assert (y[i] == joined[begin + 1 : begin + seq_len + 1]).all()
        row += rows
        before = sum(len(t) for _, t in itertools.islice(stream(docs), document))
        assert before + token == row * seq_len  # the place names the next row's first token
        assert token < len(next(stream(docs, document))[1])


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_dense_continues_from_a_place(docs, seq_len, before, after):
    whole = Dense(stream(docs), seq_len)
    _, _, document, token = whole.take(before)
    again = Dense(stream(docs, document), seq_len, token)
    for a, b in zip(whole.take(after), again.take(after), strict=True):
        assert np.array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_paper_is_one_document_a_row(docs, seq_len, takes):
    pack, row = Paper(stream(docs), seq_len, PAD), 0
    for rows in takes:
        x, y, document, token = pack.take(rows)
        for i in range(rows):
            tokens = [*docs[(row + i) % len(docs)][: seq_len - 1], EOS]
            blank = seq_len - len(tokens)
            assert x[i].tolist() == tokens + [PAD] * blank
            assert y[i].tolist() == tokens[1:] + [IGNORE] * (blank + 1)
        row += rows
        assert (document, token) == (row, 0)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 9), st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_mixed_groups_hold_the_dense_rows_and_resume_anywhere(docs, seq_len, size, takes):
    mixed = Mixed(groups(Dense(stream(docs), seq_len), size), 3)
    got = [mixed.take(rows) for rows in takes]
    x = np.concatenate([g[0] for g in got])
    dense = Dense(stream(docs), seq_len).take(len(x) + size)[0]
    for begin in range(0, len(x) - size + 1, size):
        part = slice(begin, begin + size)
        assert sorted(x[part].tolist()) == sorted(dense[part].tolist())
    for n, (_, _, document, token, group, row) in enumerate(got[:-1]):
        again = Mixed(groups(Dense(stream(docs, document), seq_len, token), size), 3, group, row)
        for rows, want in zip(takes[n + 1 :], got[n + 1 :], strict=True):
            for a, b in zip(again.take(rows), want, strict=True):
                assert np.array_equal(a, b)


def test_mixed_groups_are_permuted_each_in_its_own_way():
    docs = [[n] for n in range(4, 4 + 64)]  # rows of two: (n, EOS)
    x = Mixed(groups(Dense(stream(docs), 2), 32), 0).take(64)[0][:, 0].tolist()
    first, second = x[:32], [n - 32 for n in x[32:]]
    assert sorted(first) == sorted(second) == list(range(4, 36))
    assert first != sorted(first) and first != second
