"""data=c4 against a stand-in for the hub that fails in every way it knows, and from a folder; data=sample."""

import gzip
import logging
import lzma
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from data import DamageLimit, DataConfig, DataError, Tokenizer, build, hub, listing
from tests.hub import C4, FAULTS, T5, TEXTS, c4, digests, layout, quick, until
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups")


def first_rows(data):
    with data.loader(8) as batches:
        return next(batches).x


def write_folder(folder, ending, pack):
    folder.mkdir(parents=True)
    for name, content in layout(ending, pack).items():
        (folder / name).write_bytes(content)


def test_c4_from_the_hub_is_c4_from_a_folder(stand_in, tmp_path, c4_oracle):
    streamed = c4(tmp_path)  # tokenizer t5 by default
    assert streamed.tokenizer.path == tmp_path / "cache" / "tokenizers" / "t5.model"
    scored = streamed.validation()
    tokens = []
    for text in TEXTS["validation"][0] + TEXTS["validation"][1]:
        tokens += [*streamed.tokenizer.encode(text), streamed.tokenizer.eos_id]
    assert scored.y.ravel()[: scored.tokens].tolist() == tokens[1:]
    texts = streamed.tokenizer.decode(first_rows(streamed).ravel().tolist())
    assert sum(texts.count(f"train {f} ") for f in range(4)) > 3 and "validation" not in texts
    assert digests(streamed) == c4_oracle["dense"]
    assert not any(".py" in path for path, _ in stand_in.requests)


@pytest.mark.parametrize("ending,pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("sub", ["", "en"])
def test_c4_from_a_folder(c4_model, tmp_path, sub, ending, pack):
    write_folder(tmp_path / "c4" / sub, ending, pack)
    data = c4(tmp_path, path=str(tmp_path / "c4"), tokenizer=str(c4_model))
    assert "train" in data.tokenizer.decode(first_rows(data).ravel().tolist())
    assert "validation 1 59" in data.tokenizer.decode(data.validation().x.ravel().tolist())


@kills("data/hub.py", "hash_of(file, digest) == digest", "True")
@kills("data/hub.py", " and len(origins) == 1", "")
@pytest.mark.parametrize("packing", ["dense", "paper"])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_faults_leave_the_same_tokens(stand_in, tmp_path, c4_oracle, c4_model, packing, seed):
    stand_in.api_plan.extend(["429", "reset", "500", "503"])
    stand_in.seeded(seed, 25)
    data = c4(tmp_path, tokenizer=str(c4_model), packing=packing)
    data.validation()
    assert digests(data) == c4_oracle[packing]
    print(dict(stand_in.hits))
    assert not stand_in.plan and not stand_in.api_plan
    assert all(stand_in.hits[fault] > 0 for fault in FAULTS)


@kills("data/hub.py", "timeout=timeout", "timeout=None")
def test_a_read_that_stalls_is_given_up(stand_in, tmp_path, c4_model, c4_oracle, caplog):
    stand_in.plan.append("stall")
    assert digests(c4(tmp_path, tokenizer=str(c4_model))) == c4_oracle["dense"]
    assert "ReadTimeout" in caplog.text


@kills("data/hub.py", 'headers={"Range": f"bytes={have}-"} if have else None', "headers=None")
def test_a_cut_file_goes_on_where_it_was_cut(stand_in, tmp_path, c4_model, c4_oracle):
    stand_in.plan.extend(["cut"] * 3)
    assert digests(c4(tmp_path, tokenizer=str(c4_model))) == c4_oracle["dense"]
    asked = [span for path, span in stand_in.requests if "/store/" in path]
    starts = [int(span[6:-1]) for span in asked[1:4]]
    assert asked[0] is None and 0 < starts[0] < starts[1] < starts[2] and asked[4] is None


class Failing(hub.Hub):
    """A server without a network: so many 503, then the file."""

    def __init__(self, failures, stop=None):
        super().__init__("http://x", stop)
        self.left = failures

    def _attempt(self, *_):
        self.left -= 1
        if self.left >= 0:
            raise hub.Fault("HTTP 503")


@kills("data/hub.py", "BACKOFF_S * 2 ** min(failures, 30))", "BACKOFF_S)")
@kills("data/hub.py", "random.uniform(0, longest)", "longest")
@kills("data/hub.py", "min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures, 30))", "BACKOFF_S * 2 ** failures")
@kills("data/hub.py", "failures = 0 if fault.progress else failures + 1", "failures += not fault.progress")
def test_waits_grow_to_a_minute_and_are_drawn_from_their_whole_range(monkeypatch):
    waits = []
    monkeypatch.setattr(hub.Hub, "_pause", lambda self, what, fault, since, said, wait: waits.append(wait))
    Failing(300).download(None, "f", None)
    for failures, longest in ((1, 2), (2, 4), (3, 8), (4, 16), (5, 32)):
        assert waits[failures - 1] < longest
    assert 50 < max(waits[6:]) <= 60 and 0 < min(waits[6:]) < 10 and len(set(waits)) == 300
    waits.clear()
    server = Failing(0)
    server._attempt = Mock(side_effect=[*[hub.Fault("x")] * 20, hub.Fault("cut", progress=True), None])
    server.download(None, "f", None)
    assert max(waits[:20]) > 10 and waits[20] < 1  # bytes came: it is no outage


@kills("data/hub.py", "said is None or now - said >= SAY_S", "True")
@kills("data/hub.py", "min(until - now, said + SAY_S - now)", "until - now")
def test_a_line_at_the_first_trouble_then_one_a_minute_and_one_in_the_end(monkeypatch, caplog):
    passed = []
    monkeypatch.setattr(hub, "pause", lambda stop, seconds: passed.append(seconds))
    clock = SimpleNamespace(
        **{n: lambda: 1e9 + sum(passed) for n in ("time", "monotonic")},
        localtime=time.localtime,
        strftime=time.strftime,
    )
    monkeypatch.setattr(hub, "time", clock)
    monkeypatch.setattr(hub.random, "uniform", lambda low, high: 90.0)
    with caplog.at_level(logging.WARNING, "subspan"):
        Failing(100).download(None, "f", None)
    first, *minutes, last = [r.getMessage() for r in caplog.records]
    assert "waiting for f from http://x since" in first and first.endswith("HTTP 503")
    assert set(minutes) == {first} and len(minutes) == 150  # 9000 s
    assert last == "f from http://x: goes on after 9000 s" and max(passed) <= 60


@kills("data/hub.py", "wait = fault.after + random", "wait = random")
def test_what_the_hub_asks_to_wait_is_waited(stand_in, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(hub.Hub, "_pause", lambda self, what, fault, since, said, wait: waits.append(wait))
    monkeypatch.setattr(hub, "retry_after", lambda headers: 300.0 + float(headers["Retry-After"]))
    monkeypatch.setattr(hub, "LIST_S", 1e9)
    stand_in.api_plan.append("429")
    assert listing(DataConfig("c4", cache=str(tmp_path)))
    assert len(waits) == 1 and 300 <= waits[0] < 301
    stand_in.api_plan.append("429")
    monkeypatch.setattr(hub, "LIST_S", 100)  # later than it may be: said at once
    with pytest.raises(DataError, match="429"):
        listing(DataConfig("c4", cache=str(tmp_path / "other")))


def test_ways_to_say_when():
    assert hub.retry_after({"retry-after": "17"}) == 17
    assert hub.retry_after({"ratelimit": '"api";r=0;t=55'}) == 55
    assert hub.retry_after({"ratelimit": '"api";r=9;t=55'}) == hub.retry_after({}) == 0
    assert hub.retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert hub.retry_after({"retry-after": formatdate(4e9, usegmt=True)}) > 1e6
    assert hub.retry_after({"retry-after": "soon"}) == 0


def test_without_the_hub_there_is_one_clear_line(monkeypatch, tmp_path, c4_model):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    quick(monkeypatch)
    with pytest.raises(DataError, match="data=c4: .*cannot be listed .*data.path=FOLDER") as error:
        c4(tmp_path, tokenizer=str(c4_model))
    assert "\n" not in str(error.value)
    write_folder(tmp_path / "c4", ".gz", gzip.compress)
    for name in ("t5", "llama"):
        with pytest.raises(
            DataError, match=f"data.tokenizer={name}: .*cannot be fetched .*data.tokenizer=train"
        ):
            c4(tmp_path, path=str(tmp_path / "c4"), tokenizer=name)
    assert not (tmp_path / "cache" / "tokenizers" / "t5.model").exists()


@kills("data/hub.py", "if refused and now - refused >= refused_s:", "if False:")
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_said_at_once(stand_in, tmp_path, c4_model, status):
    stand_in.refuses = status
    with pytest.raises(DataError, match=f"data=c4: .*does not give the list .*HTTP {status}.*HF_TOKEN"):
        c4(tmp_path, tokenizer=str(c4_model))
    assert len(stand_in.requests) == 1


@kills("data/tokenizer.py", "if error.status in (401, 403):", "if False:")
@kills("data/cache.py", "kind = DamageLimit if self._server.served else DataError", "kind = DataError")
def test_refused_files_end_the_run_with_the_way_out(stand_in, tmp_path, c4_model, monkeypatch):
    stand_in.token = "secret"  # listed, as gated repositories are, but not given
    monkeypatch.setattr(hub, "REFUSED_S", 0.2)
    monkeypatch.setattr(hub, "LIST_S", 60)
    with pytest.raises(DataError, match="data.tokenizer=llama: .*gated.*HF_TOKEN.*data.tokenizer=train"):
        c4(tmp_path, tokenizer="llama")
    with pytest.raises(DataError, match="does not give c4-validation.*401.*HF_TOKEN"):
        c4(tmp_path, tokenizer=str(c4_model)).validation()
    monkeypatch.setenv("HF_TOKEN", "secret")  # sent to the hub, and not to the store behind it
    data = c4(tmp_path, tokenizer="llama")
    stand_in.plan.extend([None, *["404"] * 999])
    with data.loader(8) as batches, pytest.raises(DamageLimit, match="does not give c4-train.*404"):
        for _ in range(60):
            next(batches)


@kills("data/hub.py", "refused_s = REFUSED_S if self.served else 0.0", "refused_s = 0.0")
def test_a_refusal_in_a_run_may_pass(stand_in, tmp_path, c4_model, c4_oracle):
    stand_in.plan.extend([None, "404", "404"])
    assert digests(c4(tmp_path, tokenizer=str(c4_model))) == c4_oracle["dense"]
    assert stand_in.hits["404"] == 2


def test_a_mirror_by_address_is_used_instead_of_the_hub(stand_in, tmp_path, c4_oracle, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert digests(c4(tmp_path, path=stand_in.address + "/")) == c4_oracle["dense"]  # its tokenizer too


def test_a_mirror_with_xz(stand_in, tmp_path, c4_model):
    stand_in.files.clear()
    files = layout(".xz", lzma.compress)
    stand_in.add(C4, {f"en/{n}": content for n, content in files.items()})
    assert len(digests(c4(tmp_path, path=stand_in.address, tokenizer=str(c4_model)))) == 60


@kills("data/tokenizer.py", "if digest is None or hub.hash_of(kept, digest) == digest:", "if True:")
def test_a_fetched_tokenizer_is_kept_with_its_hash(stand_in, tmp_path, caplog):
    stand_in.plan.extend(["503", "wrong", "cut"])
    path = c4(tmp_path).tokenizer.path
    before = len(stand_in.requests)
    content = path.read_bytes()
    assert c4(tmp_path).tokenizer.path == path
    assert not any(T5 in name for name, _ in stand_in.requests[before:])
    path.write_bytes(content[:-1])
    with caplog.at_level(logging.WARNING, "subspan"):
        assert c4(tmp_path).tokenizer.path.read_bytes() == content
    assert f"{path} is damaged" in caplog.text


@kills("data/cache.py", "revision = revision or server.newest", "revision = server.newest")
@kills("data/loader.py", 'self._identity["data.revision"] = files.revision', "pass")
def test_a_run_keeps_the_commit_it_was_started_with(stand_in, tmp_path, c4_model, c4_oracle):
    cfg = DataConfig("c4", cache=str(tmp_path / "cache"), workers=0, tokenizer=str(c4_model))
    with c4(tmp_path, tokenizer=str(c4_model)).loader(8) as batches:
        state = [next(batches) for _ in range(5)][-1].state
    old, stand_in.revision = stand_in.revision, "ab" * 20
    assert listing(cfg, state).revision == old
    assert listing(cfg).revision == stand_in.revision
    resumed = build(cfg, vocab_size=300, seq_len=16, seed=0, files=listing(cfg, state))
    assert digests(resumed, 10, state) == c4_oracle["dense"][5:15]
    with pytest.raises(DataError, match=f"data.revision={stand_in.revision}: .*{old}"):
        c4(tmp_path, tokenizer=str(c4_model)).loader(8, state=state)
    (tmp_path / "cache" / "c4" / f"{old[:12]}.json").unlink()  # then the hub is asked for that commit
    with pytest.raises(DataError, match="404"):
        listing(cfg, state)


def test_a_run_from_the_hub_goes_on_from_a_copy_and_back(stand_in, tmp_path, c4_model, c4_oracle):
    write_folder(tmp_path / "copy", ".gz", gzip.compress)
    state, got = None, []
    for path in (None, str(tmp_path / "copy"), stand_in.address):
        with c4(tmp_path, tokenizer=str(c4_model), path=path).loader(8, state=state) as batches:
            taken = [next(batches) for _ in range(7)]
        state, got = taken[-1].state, got + [b.digest for b in taken]
    assert got == c4_oracle["dense"][:21]


def test_a_kept_list_that_is_damaged_is_made_again(stand_in, tmp_path, c4_model, caplog):
    cfg = DataConfig("c4", cache=str(tmp_path), workers=0)
    found = listing(cfg)
    assert sorted(found.files) == sorted(layout())
    (path,) = (tmp_path / "c4").glob("*.json")
    for content in ("{", "[]", '{"repo": 1}', path.read_text().replace('"files": {', '"files": {"a": 1, ')):
        path.write_text(content)
        with caplog.at_level(logging.WARNING, "subspan"):
            assert listing(cfg) == found
        assert f"the list kept in {path} is damaged" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b'[{"path": 1}]', b'[{"type": "file", "path": "x"}]'])
def test_answers_that_are_no_list(stand_in, tmp_path, monkeypatch, answer):
    monkeypatch.setattr("tests.hub.Front.api", lambda self, *_: self.answer(answer))
    with pytest.raises(DataError, match="data=c4: .*cannot be listed"):
        listing(DataConfig("c4", cache=str(tmp_path)))


def test_other_sources_have_no_list(tmp_path):
    assert listing(DataConfig("sample")) is None and listing(DataConfig("c4", path=str(tmp_path))) is None


def test_offline_is_taken_at_its_word(stand_in, tmp_path, c4_model, monkeypatch, c4_oracle, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        c4(tmp_path, tokenizer=str(c4_model))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    digests(c4(tmp_path, tokenizer=str(c4_model)))
    before = len(stand_in.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = c4(tmp_path, tokenizer=str(c4_model))
    assert digests(data) == c4_oracle["dense"] and len(stand_in.requests) == before
    assert "reading commit" in caplog.text
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        data.validation()


def test_closing_waits_for_nothing(stand_in, tmp_path, c4_model, monkeypatch, c4_oracle):
    """In a back-off of hours, in a read that hangs: the threads end, the trainer at once."""
    data = c4(tmp_path, tokenizer=str(c4_model))
    monkeypatch.setattr(hub, "BACKOFF_S", 1e6)
    monkeypatch.setattr(hub, "BACKOFF_MAX_S", 1e6)
    stand_in.down = True
    batches = data.loader(8)
    asked = iter([False] * 3 + [True] * 99)
    assert batches.wait(lambda: next(asked)) is None
    (thread,) = [t for t in threading.enumerate() if t.name == "download"]
    batches.close()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        batches.wait(lambda: False)
    stand_in.down = False
    monkeypatch.setattr(hub, "READ_S", 20)
    stand_in.plan.append("stall")
    batches = data.loader(8)
    until(lambda: stand_in.hits["stall"])
    batches.close()
    assert not batches._ahead._thread.is_alive()
    stand_in.unstall.set()


def test_waiting_for_a_batch_prefers_the_batch(stand_in, tmp_path, c4_model, c4_oracle):
    with c4(tmp_path, tokenizer=str(c4_model)).loader(8) as batches:
        got = []
        while len(got) < 30:
            batch = batches.wait(lambda: True)
            got += [] if batch is None else [batch.digest]
    assert got == c4_oracle["dense"][:30]


def test_a_folder_without_c4s_layout(tmp_path, c4_model):
    with pytest.raises(DataError, match="data.path=.*: no file c4-train"):
        c4(tmp_path, path=str(tmp_path), tokenizer=str(c4_model))


def test_the_sample_is_english_and_holds_speeches_out(tmp_path, c4_model):
    cfg = DataConfig("sample", tokenizer=str(c4_model), workers=0)
    data = build(cfg, vocab_size=300, seq_len=64, seed=0)
    train, held_out = data._train.files, data._validation.files
    assert len(held_out) == 4 and len(train) > 200 and not set(train) & set(held_out)
    assert " the " in data.tokenizer.decode(first_rows(data).ravel().tolist())
    assert data.validation(5000).tokens == 5000
    assert Tokenizer(c4_model).sha256 == data.tokenizer.sha256
