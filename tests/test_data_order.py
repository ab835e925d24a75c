"""Tokens are a pure function of (seed, position): any stops, ranks and workers give the same rows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DamageLimit, DataConfig, DataError, build, loader, source
from data.files import Damage
from data.pack import permutation
from data.source import Cursor, Source

pytestmark = pytest.mark.usefixtures("small_groups")

ROOT = Path(__file__).parents[1]
COUNTS = (23, 5, 0, 11)  # documents a file; 39 a epoch in blocks of 7
BLOCK = 7
SEQ = 16


def write(folder, counts=COUNTS):
    rng = random.Random(1)
    for f, count in enumerate(counts):
        with open(folder / f"{f}.jsonl", "w") as file:
            for d in range(count):
                words = [
                    rng.choice(("tree", "house", "river", "stone")) for _ in range(rng.choice((1, 5, 60)))
                ]
                file.write(json.dumps({"text": f"{f}-{d} " + " ".join(words)}) + "\n")
            if not count:
                file.write("\n")
    (folder / "v.txt").write_text("A tree by the river. " * 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_DOCUMENTS", BLOCK)
        patch.setattr(loader, "CHUNK", 3)
        yield folder


def dataset(folder, packing="dense", workers=0, seed=5):
    cfg = DataConfig(
        "local", f"{folder}/*.jsonl", f"{folder}/v.txt", packing, "train", workers, str(folder / "cache")
    )
    return build(cfg, vocab_size=320, seq_len=SEQ, seed=seed)


@pytest.fixture(scope="module")
def datasets(folder):
    return {packing: dataset(folder, packing) for packing in ("dense", "paper")}


def read(data, rows, steps, world=1, state=None):
    """(x, y) of the global rows of some steps, and the position after them, passed through JSON."""
    loaders = [data.loader(rows, rank, world, state) for rank in range(world)]
    try:
        xs, ys, states = [], [], [state] * world
        for _ in range(steps):
            batches = [next(one) for one in loaders]
            assert all(b.x.shape == (rows // world, SEQ) for b in batches)
            assert all(b.valid == int((b.y != -100).sum()) for b in batches)
            xs += [b.x.numpy() for b in batches]
            ys += [b.y.numpy() for b in batches]
            states = [json.loads(json.dumps(b.state)) for b in batches]
            assert all(s == states[0] for s in states)
        empty = [np.empty((0, SEQ), np.int64)]
        return np.concatenate(empty + xs), np.concatenate(empty + ys), states[0]
    finally:
        for one in loaders:
            one.close()


@pytest.mark.parametrize("packing", ["dense", "paper"])
def test_any_stops_and_ranks_give_the_same_rows(datasets, packing):
    data = datasets[packing]
    whole = read(data, 6, 30)[:2]  # several epochs

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from((1, 2, 3)), st.sampled_from((6, 12))), max_size=4
        )
    )
    def check(stops):
        state, row = None, 0
        for steps, world, rows in stops:
            x, y, state = read(data, rows, steps, world, state)
            assert np.array_equal(x, whole[0][row : row + len(x)])
            assert np.array_equal(y, whole[1][row : row + len(y)])
            row += len(x)
            if row > 100:
                return

    check()


def test_the_rows_are_the_joined_documents_in_the_order_of_the_blocks(datasets, folder):
    data = datasets["dense"]
    files = Source([str(folder / f"{f}.jsonl") for f in range(len(COUNTS))], seed=5)
    blocks = files.blocks(Cursor(), Damage())
    tokens = []
    while len(tokens) < (30 * 6 + 16) * SEQ + 1:
        for text in next(blocks)[1]:
            tokens += [*data.tokenizer.encode(text), data.tokenizer.eos_id]
    x, y, _ = read(data, 6, 30)
    group = 256 // SEQ  # rows that are mixed, by a permutation drawn from (seed, number of the group)
    for row in range(len(x)):
        begin = (row - row % group + permutation(group, 5, row // group)[row % group]) * SEQ
        assert x[row].tolist() == tokens[begin : begin + SEQ]
        assert y[row].tolist() == tokens[begin + 1 : begin + SEQ + 1]


def test_each_epoch_has_every_document_once_in_another_order(datasets):
    x = read(datasets["paper"], 39, 3)[0]  # one row a document
    names = [datasets["paper"].tokenizer.decode(row[:8].tolist()).split()[0] for row in x]
    epochs = [names[:39], names[39:78], names[78:]]
    assert sorted(epochs[0]) == sorted(f"{f}-{d}" for f, n in enumerate(COUNTS) for d in range(n))
    for other in epochs[1:]:
        assert sorted(other) == sorted(epochs[0]) and other != epochs[0]
    assert any(names[i].split("-")[0] != names[i + 1].split("-")[0] for i in range(3))  # files mix in a block


def test_each_block_of_each_epoch_is_permuted_in_its_own_way(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_DOCUMENTS", 100)
        blocks = Source([str(tmp_path / "a.jsonl")], seed=1).blocks(Cursor(), Damage())
        orders = [[int(text) % 100 for text in next(blocks)[1]] for _ in range(4)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_another_seed_is_another_order(datasets, folder):
    assert not np.array_equal(read(datasets["dense"], 6, 2)[0], read(dataset(folder, seed=6), 6, 2)[0])


def test_workers_change_nothing(datasets, folder):
    with_two = dataset(folder, workers=2)
    x, y, state = read(datasets["dense"], 6, 9)
    a = read(with_two, 6, 4)
    b = read(datasets["dense"], 6, 2, state=a[2])
    c = read(with_two, 6, 3, state=b[2])
    assert np.array_equal(x, np.concatenate([a[0], b[0], c[0]]))
    assert np.array_equal(y, np.concatenate([a[1], b[1], c[1]]))
    assert state == c[2]


def test_the_state_is_small_and_names_what_it_refers_to(datasets, folder):
    state = read(datasets["dense"], 6, 3)[2]
    assert len(json.dumps(state)) < 1000
    with pytest.raises(DataError, match="data.packing=paper: .*dense"):
        datasets["paper"].loader(6, state=state)
    with pytest.raises(DataError, match="seed=6: .*5"):
        dataset(folder, seed=6).loader(6, state=state)


def test_a_negative_seed_is_refused(folder):
    with pytest.raises(DataError, match="seed=-1: "):
        dataset(folder, seed=-1)


def test_rows_must_divide_among_the_ranks(datasets):
    with pytest.raises(ValueError, match="rows=7 .* 2 ranks"):
        datasets["dense"].loader(7, world=2)


def test_an_error_in_the_thread_arrives_with_its_type_and_stays(tmp_path):
    write(tmp_path, (30,))
    data = dataset(tmp_path)
    (tmp_path / "0.jsonl").write_text("\n" * 5)  # no document any more
    with data.loader(6) as batches:
        for _ in range(2):
            with pytest.raises(DamageLimit, match="no readable document"):
                next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def workers_of(batches):
    return [child.pid for child in batches._stream._pool._children]


def gone(pid):
    """Waits for the end of a process that is not ours to wait for."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (OSError, ValueError):
            return True
        time.sleep(0.02)
    return False


def test_a_worker_ignores_signals_and_its_death_is_an_error(folder):
    data = dataset(folder, workers=1)
    x = read(data, 6, 40)[0]
    with data.loader(6) as batches:
        first = next(batches).x.numpy()
        (worker,) = workers_of(batches)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        rest = [next(batches).x.numpy() for _ in range(39)]
        assert np.array_equal(x, np.concatenate([first, *rest]))
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="-9"):
            for _ in range(1000):
                next(batches)


def test_workers_end_with_a_killed_parent(folder):
    code = f"""
import sys
from data import DataConfig, build
cfg = DataConfig("local", "{folder}/*.jsonl", "{folder}/v.txt", "dense", "train", 2, "{folder}/cache")
batches = build(cfg, vocab_size=320, seq_len=16, seed=5).loader(6)
next(batches)
print(*[child.pid for child in batches._stream._pool._children], flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.communicate()
    assert all(gone(w) for w in workers)
