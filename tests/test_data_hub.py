"""data=c4 against a stand-in for the hub, from a folder, and without a network; data=sample."""

import gzip
import http.server
import json
import lzma
import re
import threading

import pytest

from data import DataConfig, DataError, Tokenizer, build, tokenizer
from data.source import Source

pytestmark = pytest.mark.usefixtures("small_groups")

TEXTS = {
    s: [[f"{s} {f} {d}: the river and the hill." for d in range(60)] for f in range(2)]
    for s in ("train", "validation")
}


def shard(texts):
    return "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "t.jsonl").write_bytes(shard(TEXTS["train"][0]))
    return tokenizer.trained(Source([str(folder / "t.jsonl")]), 300, folder)


@pytest.fixture
def hub(model, monkeypatch, tmp_path):
    """The two calls of the hub that are used: list a folder, read a range of a file."""
    files = {"google-t5/t5-base/spiece.model": model.read_bytes()}
    for split, shards in TEXTS.items():
        for i, texts in enumerate(shards):
            files[f"datasets/allenai/c4/en/c4-{split}.{i:05d}-of-00002.json.gz"] = gzip.compress(shard(texts))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].strip("/")
            listed = re.fullmatch(r"api/(datasets/allenai/c4)/tree/main/en", path)
            if listed:
                names = [n.removeprefix("datasets/allenai/c4/") for n in files if n.startswith("datasets")]
                entries = [
                    {"type": "file", "path": n, "size": len(files[f"{listed[1]}/{n}"]), "oid": "0"}
                    for n in names
                ]
                return self.answer(json.dumps(entries).encode())
            top = re.fullmatch(
                r"api/models/google-t5/t5-base/tree/main|api/models/google-t5/t5-base/paths-info/main", path
            )
            if top:
                size = len(files["google-t5/t5-base/spiece.model"])
                return self.answer(
                    json.dumps([{"type": "file", "path": "spiece.model", "size": size, "oid": "0"}]).encode()
                )
            if path in ("api/datasets/allenai/c4", "api/models/google-t5/t5-base"):
                return self.answer(json.dumps({"id": path.partition("/")[2], "sha": "0" * 40}).encode())
            content = files.get(path.replace("/resolve/main", ""))
            if content is None:
                return self.answer(b"{}", 404)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
            if not wanted:
                return self.answer(content)
            self.answer(content[int(wanted[1]) : int(wanted[2]) + 1], 206)

        do_POST = do_GET

        def answer(self, body, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield files
    server.shutdown()
    server.server_close()


def c4(tmp_path, **settings):
    cfg = DataConfig("c4", cache=str(tmp_path / "cache"), workers=0, **settings)
    return build(cfg, vocab_size=300, seq_len=16, seed=0)


def first_rows(data):
    with data.loader(8) as batches:
        return next(batches).x


def write_folder(folder, ending, pack):
    folder.mkdir(parents=True)
    for split, shards in TEXTS.items():
        for i, texts in enumerate(shards):
            (folder / f"c4-{split}.{i:05d}-of-00002.json{ending}").write_bytes(pack(shard(texts)))


def test_c4_from_the_hub_is_c4_from_a_folder(hub, tmp_path):
    streamed = c4(tmp_path)  # tokenizer t5 by default
    assert streamed.tokenizer.path == tmp_path / "cache" / "tokenizers" / "t5.model"
    scored = streamed.validation()
    tokens = []
    for text in TEXTS["validation"][0] + TEXTS["validation"][1]:
        tokens += [*streamed.tokenizer.encode(text), streamed.tokenizer.eos_id]
    assert scored.y.ravel()[: scored.tokens].tolist() == tokens[1:]
    texts = streamed.tokenizer.decode(first_rows(streamed).ravel().tolist())
    assert texts.count("train 0 ") + texts.count("train 1 ") > 3 and "validation" not in texts
    hub.clear()  # the fetched tokenizer is kept
    write_folder(tmp_path / "en", ".gz", gzip.compress)
    assert c4(tmp_path, path=str(tmp_path)).validation().y.equal(scored.y)


@pytest.mark.parametrize("ending,pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("sub", ["", "en"])
def test_c4_from_a_folder(model, tmp_path, sub, ending, pack):
    write_folder(tmp_path / "c4" / sub, ending, pack)
    data = c4(tmp_path, path=str(tmp_path / "c4"), tokenizer=str(model))
    assert "train" in data.tokenizer.decode(first_rows(data).ravel().tolist())
    assert "validation 1 59" in data.tokenizer.decode(data.validation().x.ravel().tolist())


def test_without_the_hub_there_is_one_clear_line(monkeypatch, tmp_path, model):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="data=c4: .*cannot be listed .*data.path=FOLDER") as error:
        c4(tmp_path, tokenizer=str(model))
    assert "\n" not in str(error.value)
    write_folder(tmp_path / "c4", ".gz", gzip.compress)
    for name in ("t5", "llama"):
        with pytest.raises(
            DataError, match=f"data.tokenizer={name}: .*cannot be fetched .*data.tokenizer=train"
        ):
            c4(tmp_path, path=str(tmp_path / "c4"), tokenizer=name)
    assert not (tmp_path / "cache" / "tokenizers" / "t5.model").exists()


def test_a_folder_without_c4s_layout(tmp_path, model):
    with pytest.raises(DataError, match="data.path=.*: no file c4-train"):
        c4(tmp_path, path=str(tmp_path), tokenizer=str(model))


def test_the_sample_is_english_and_holds_speeches_out(tmp_path, model):
    cfg = DataConfig("sample", tokenizer=str(model), workers=0)
    data = build(cfg, vocab_size=300, seq_len=64, seed=0)
    train, held_out = data._train.files, data._validation.files
    assert len(held_out) == 4 and len(train) > 200 and not set(train) & set(held_out)
    assert " the " in data.tokenizer.decode(first_rows(data).ravel().tolist())
    assert data.validation(5000).tokens == 5000
    assert Tokenizer(model).sha256 == data.tokenizer.sha256
