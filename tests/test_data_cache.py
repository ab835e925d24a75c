"""The shard cache: what it saves, what it survives, what it may hold, and who shares it."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import DataConfig, DataError, cache, hub, listing
from data.cache import Opener, Shelf
from data.prepare import prepare
from tests.hub import C4, c4, digests, layout, until
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups")

ROOT = Path(__file__).parents[1]
SHARDS = [n for n in layout() if "train" in n]
SIZE = max(len(content) for content in layout().values())


def shelf(tmp_path, shards=20, split="train"):
    """A shelf for so many shards, and the names on it."""
    cfg = DataConfig("c4", cache=str(tmp_path / "cache"), cache_gib=shards * SIZE / 2**30)
    found = listing(cfg)
    return Shelf(found, cfg), cache.names(found, split)


def stored(tmp_path):
    """Name -> bytes of what the cache holds."""
    found = {}
    for path in (tmp_path / "cache" / "c4").glob("*/c4-*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:
            pass
    return {n: size for n, size in found.items() if not n.endswith(".lock")}


@kills("data/cache.py", "        if revision in kept:  # a", "        if False:  # a")
def test_epochs_resumes_and_runs_download_a_shard_once(stand_in, tmp_path, c4_model, c4_oracle):
    data = c4(tmp_path, tokenizer=str(c4_model))
    with data.loader(8) as batches:
        taken = [next(batches) for _ in range(60)]
    assert [b.digest for b in taken] == c4_oracle["dense"]
    assert stand_in.downloads() == dict.fromkeys(SHARDS, 1)
    again = c4(tmp_path, tokenizer=str(c4_model))
    for at in (3, 17, 44):
        assert digests(again, 10, taken[at].state) == c4_oracle["dense"][at + 1 : at + 11]
    assert stand_in.downloads() == dict.fromkeys(SHARDS, 1)
    assert sum("/tree/" in path for path, _ in stand_in.requests) == 3  # pages; kept with its commit


@kills("data/cache.py", "        found = known[-1]\n", "        raise\n")
def test_an_outage_with_a_warm_cache_is_not_noticed(stand_in, tmp_path, c4_model, c4_oracle, caplog):
    data = c4(tmp_path, tokenizer=str(c4_model))
    data.validation()
    with data.loader(8) as batches, caplog.at_level(logging.WARNING, "subspan"):
        got = [next(batches).digest for _ in range(30)]
        stand_in.down = True
        got += [next(batches).digest for _ in range(30)]
        assert got == c4_oracle["dense"] and not caplog.records
        began = c4(tmp_path, tokenizer=str(c4_model))  # a start in the outage
        assert began.validation().tokens == data.validation().tokens
        assert digests(began) == c4_oracle["dense"]
    said = [r.getMessage() for r in caplog.records if "at http" not in r.getMessage()]
    assert len(said) == 1 and "cannot be asked" in said[0] and "as kept" in said[0]


@kills("data/ahead.py", "                if asked():", "                if True:")
@kills(
    "data/hub.py",
    "except (library.HTTPError, library.InvalidURL, ConnectionError, TimeoutError)",
    "except TimeoutError",
)
def test_in_an_outage_with_a_cold_cache_the_loader_waits_and_goes_on(
    stand_in, tmp_path, c4_model, c4_oracle, caplog
):
    data = c4(tmp_path, tokenizer=str(c4_model))
    stand_in.down = True
    with caplog.at_level(logging.WARNING, "subspan"), data.loader(8) as batches:
        assert batches.wait(lambda: len(stand_in.requests) > 8) is None
        assert "waiting for c4-train" in caplog.text and "goes on" not in caplog.text
        stand_in.down = False
        assert [next(batches).digest for _ in range(60)] == c4_oracle["dense"]
    assert "goes on after" in caplog.text


@kills("data/cache.py", "self.limit < 2 * largest", "self.limit < largest")
def test_a_bound_below_two_shards_is_refused(stand_in, tmp_path, c4_model):
    with pytest.raises(DataError, match=r"data.cache_gib=.*less than two shards.*give .* or more"):
        shelf(tmp_path, 1.9)
    assert [shelf(tmp_path, n)[0].ahead for n in (2, 3, 4, 9)] == [1, 2, 2, 2]


@kills("data/cache.py", "if excess > 0 and not ours and _remove(path):", "if False:")
@kills("data/cache.py", "if excess > 0 and not ours and _remove(path):", "if not ours and _remove(path):")
@kills("data/cache.py", "key=lambda f: f[2]", "key=lambda f: -f[2]")
@kills("data/cache.py", "            os.utime(file.fileno())", "            pass")
def test_the_least_recently_used_shards_go(stand_in, tmp_path):
    store, names = shelf(tmp_path, 3)
    server = hub.Hub(stand_in.address)
    clock = time.time() - 1000
    for turn, name in enumerate([*names[:3], names[0], names[3]]):
        store.open(name, server, []).close()
        path = store.folder / name
        if turn != 3:  # the first one is used again: now
            os.utime(path, (clock + turn, clock + turn))
    assert set(stored(tmp_path)) == {names[0], names[2], names[3]}


@kills("data/cache.py", "lock(file, fcntl.LOCK_SH)", "pass")
def test_what_is_read_and_read_ahead_stays_for_other_processes_too(stand_in, tmp_path, caplog):
    store, names = shelf(tmp_path, 3)
    opener = Opener(store)
    reading = opener.open(names[0], names[1:3])
    until(lambda: len(opener._ready) == 2)
    other = shelf(tmp_path, 3)[0]  # as another run would: it knows nothing of ours but the locks
    with caplog.at_level(logging.WARNING, "subspan"):
        other.open(names[3], hub.Hub(stand_in.address), []).close()
    assert set(stored(tmp_path)) == set(names) and "too little" in caplog.text
    assert reading.read() == stand_in.files[f"{C4}/en/{names[0]}"]
    reading.close()
    opener.close()


@kills("data/cache.py", "busy = [self._reading, *self._wanted]", "busy = [self._reading]")
@kills("data/cache.py", "busy = [self._reading, *self._wanted]", "busy = list(self._wanted)")
@kills("data/cache.py", "return error.errno not in (errno.EAGAIN, errno.EACCES)", "raise")
def test_without_locks_the_bound_and_what_is_needed_are_kept_too(stand_in, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    store, names = shelf(tmp_path, 3)
    opener, order = Opener(store), names * 4
    for i, name in enumerate(order):
        with opener.open(name, order[i + 1 :]) as file:
            needed = {name, *order[i + 1 : i + 3]}
            until(lambda needed=needed: needed <= set(stored(tmp_path)))
            assert sum(stored(tmp_path).values()) <= store.limit
            assert len(file.read()) == store.files.files[name][0]
        for one in needed:  # as if what is needed had not been used for long, and what is done with just now
            os.utime(store.folder / one, (1, 1) if one != name else None)
    opener.close()


@pytest.mark.parametrize("shards", [2, 3])
def test_a_small_cache_keeps_its_bound_and_the_tokens(stand_in, tmp_path, c4_model, c4_oracle, shards):
    bound = shards * SIZE
    data = c4(tmp_path, tokenizer=str(c4_model), cache_gib=bound / 2**30)
    stand_in.plan.extend(["cut", None, "wrong", None] * 10)
    got, most = [], 0
    with data.loader(8) as batches:
        for _ in range(60):
            got.append(next(batches).digest)
            most = max(most, sum(stored(tmp_path).values()))
    assert got == c4_oracle["dense"] and 0 < most <= bound
    assert sum(stand_in.downloads().values()) > len(SHARDS)  # later epochs download again


def test_a_list_of_another_commit_shares_the_bound(stand_in, tmp_path):
    store, names = shelf(tmp_path, 3)
    server = hub.Hub(stand_in.address)
    for name in names[:3]:
        store.open(name, server, []).close()
    stand_in.revision = "ab" * 20
    newer, names = shelf(tmp_path, 3)
    newer.open(names[0], server, []).close()
    assert newer.folder != store.folder
    assert len(list(store.folder.glob("*.gz"))) == 2 and len(list(newer.folder.glob("*.gz"))) == 1


@kills("data/cache.py", "mark not in self._checked and", "False and")
@kills("data/cache.py", "state.st_size != size or", "")
@pytest.mark.parametrize("damage", ["bit", "short", "empty"])
def test_a_damaged_shard_is_named_and_fetched_again(stand_in, tmp_path, caplog, damage):
    store, names = shelf(tmp_path)
    server = hub.Hub(stand_in.address)
    store.open(names[0], server, []).close()
    path = store.folder / names[0]
    good = path.read_bytes()
    if damage == "bit":
        path.write_bytes(bytes([*good[:-1], good[-1] ^ 4]))
        store = shelf(tmp_path)[0]  # a process hashes a shard once
    else:
        path.write_bytes(good[:-1] if damage == "short" else b"")
    with caplog.at_level(logging.WARNING, "subspan"):
        assert store.open(names[0], server, []).read() == good
    assert f"{path} is damaged" in caplog.text and stand_in.downloads() == {names[0]: 2}


def test_two_are_downloaded_while_one_is_read(stand_in, tmp_path):
    store, names = shelf(tmp_path)
    opener = Opener(store)
    opener.open(names[0], names[1:]).close()
    until(lambda: len(opener._ready) == 2)
    opener.open(names[1], names[2:3]).close()
    until(lambda: len(opener._ready) == 1)
    assert stand_in.downloads() == dict.fromkeys(names[:3], 1)
    opener.close()
    assert not opener._ready


def test_the_next_epoch_is_read_ahead_at_the_end_of_one(stand_in, tmp_path, c4_model, monkeypatch):
    asked = []
    real = Opener.open

    def open_(self, name, following=()):
        following = list(following)
        asked.append((name, following))
        return real(self, name, following)

    monkeypatch.setattr(Opener, "open", open_)
    digests(c4(tmp_path, tokenizer=str(c4_model)))
    order = [name for name, _ in asked]
    assert len(order) > 8
    for i, (_, following) in enumerate(asked[:6]):
        assert following[:2] == order[i + 1 : i + 3]


def test_a_full_disk_is_said(stand_in, tmp_path):
    store, names = shelf(tmp_path)
    store.folder.mkdir()
    (store.folder / f"{names[0]}.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match="data.cache: .* cannot be written .*No space left.*data.cache_gib"):
        store.open(names[0], hub.Hub(stand_in.address), [])


@kills(
    "data/hub.py", "                if not self.served:\n                    raise", "                raise"
)
def test_a_disk_that_fills_up_during_a_run_is_waited_for(stand_in, tmp_path, caplog, monkeypatch):
    store, names = shelf(tmp_path)
    server, waits = hub.Hub(stand_in.address), []
    store.open(names[0], server, []).close()
    part = store.folder / f"{names[1]}.part"
    part.symlink_to("/dev/full")

    def pause(stop, seconds):
        waits.append(seconds)
        if len(waits) == 3:
            part.unlink()
        return False

    monkeypatch.setattr(hub, "pause", pause)
    content = store.open(names[1], server, []).read()
    assert content == stand_in.files[f"{C4}/en/{names[1]}"] and len(waits) >= 3
    assert "cannot be written" in caplog.text and "goes on after" in caplog.text


READER = """
import sys, data
from data import cache, hub, pack
pack.GROUP_TOKENS, hub.BACKOFF_S, cache.POLL_S = 256, 0.01, 0.02
cfg = data.DataConfig("c4", cache=sys.argv[1], workers=0, tokenizer=sys.argv[2])
with data.build(cfg, vocab_size=300, seq_len=16, seed=0).loader(8, int(sys.argv[3]), 2) as batches:
    print(*[next(batches).digest for _ in range(60)])
"""


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@kills(
    "data/cache.py",
    "while not lock(file, fcntl.LOCK_EX):\n                if stop",
    "while False:\n                if stop",
)
def test_two_ranks_of_a_node_download_a_shard_once(stand_in, tmp_path, c4_model, c4_oracle):
    stand_in.plan.extend(["cut"] * 12)
    ranks = [start(READER, tmp_path / "cache", c4_model, rank) for rank in range(2)]
    halves = [[int(word) for word in p.communicate(timeout=100)[0].split()] for p in ranks]
    assert [a + b for a, b in zip(*halves, strict=True)] == c4_oracle["dense"]
    starts = [path for path, span in stand_in.requests if "/store/" in path and span is None]
    assert len(starts) == len(SHARDS)


KILLED = """
import sys
from data import DataConfig, cache, hub
hub.READ_S = 30
cfg = DataConfig("c4", cache=sys.argv[1])
store = cache.Shelf(cache.listing(cfg), cfg)
print("begins", flush=True)
store.open(sys.argv[2], hub.Hub(cache.endpoint(cfg)), [])
"""


@kills("data/hub.py", "                    file.flush()  # a process that is killed now leaves it\n", "")
def test_a_killed_download_goes_on_from_what_it_had(stand_in, tmp_path):
    store, names = shelf(tmp_path)
    stand_in.plan.append("stall")  # half of it comes, then nothing
    stand_in.stall_s = 60
    process = start(KILLED, tmp_path / "cache", names[0])
    size = store.files.files[names[0]][0]
    until(lambda: stored(tmp_path).get(f"{names[0]}.part", 0) == size // 2)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stand_in.unstall.set()
    content = store.open(names[0], hub.Hub(stand_in.address), []).read()
    assert content == stand_in.files[f"{C4}/en/{names[0]}"]
    spans = [span for path, span in stand_in.requests if "/store/" in path]
    assert spans == [None, f"bytes={size // 2}-"]
    assert set(stored(tmp_path)) == {names[0]}


def test_preparing_reads_the_hub_too(stand_in, tmp_path, c4_model):
    cfg = DataConfig("c4", cache=str(tmp_path / "cache"), workers=0, tokenizer=str(c4_model))
    meta = prepare(cfg, tmp_path / "out", 300)
    assert sum(s["documents"] for s in meta["splits"]["train"]) == 240
    assert set(stand_in.downloads().values()) == {1}
