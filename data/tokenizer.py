"""SentencePiece tokenizers: one model file, found by name, fetched or trained."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import hub
from .archive import cache_dir, one_line, write_atomic
from .cache import endpoint
from .config import DataConfig, DataError
from .files import Damage
from .source import Source

log = logging.getLogger("subspan")

TRAIN_BYTES = 50_000_000  # of text that a trained tokenizer sees
SENTENCE_BYTES = 4000  # SentencePiece ignores longer ones (its max_sentence_length is 4192)
# Ungated copies. T5's file has 32,000 pieces: its 100 sentinels exist only in Hugging Face's wrapper.
HUB_FILES = {
    "t5": ("google-t5/t5-base", "spiece.model"),
    "llama": ("hf-internal-testing/llama-tokenizer", "tokenizer.model"),
}
# Every setting that decides the pieces; part of the cache key. Identity normalisation, kept white space, byte
# fallback and no dummy prefix make decode(encode(text)) == text and the pieces' bytes add up to the text's
# (except for U+2581, SentencePiece's own mark for a space). Same input and number of threads: same file.
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "normalization_rule_name": "identity",
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "num_threads": 2,
}


class Tokenizer:
    """One SentencePiece model file. DataError where the file cannot serve."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            if not model:
                raise RuntimeError("the file is empty")
            self._sp = SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"data.tokenizer={path}: not a SentencePiece model ({one_line(error)}); "
                "name a model file, t5, llama or train"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.get_piece_size()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = max(self._sp.pad_id(), 0)  # 0 where the model has none
        if self.eos_id < 0:
            raise DataError(
                f"data.tokenizer={path}: it has no end-of-text piece; train one with eos_id, or use train"
            )

    def encode(self, text: str) -> list[int]:
        """Ids without an end-of-text."""
        return self._sp.encode(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without an end-of-text; one thread."""
        return [np.array(ids, dtype=np.int32) for ids in self._sp.encode(texts, num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text; ids outside the file's pieces (a model may have a larger vocabulary) are dropped."""
        return self._sp.decode([int(i) for i in ids if 0 <= int(i) < self.vocab_size])

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes of each piece's text; U+2581, byte pieces count 1, control 0."""
        sp = self._sp
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if sp.is_byte(i):
                lengths[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                lengths[i] = len(sp.id_to_piece(i).replace("\u2581", " ").encode())
        return lengths


def find_tokenizer(cfg: DataConfig, train: Source, vocab_size: int) -> Tokenizer:
    """The tokenizer of data.tokenizer, or the source's default: t5 for c4, one trained on the text elsewhere.

    DataError where it cannot be had or has more pieces than the model's `vocab_size`.
    """
    name = cfg.tokenizer or ("t5" if cfg.name == "c4" else "train")
    if name == "train":
        path = trained(train, vocab_size, cache_dir(cfg))
    elif name in HUB_FILES:
        path = fetched(name, cfg)
    else:
        path = Path(name).expanduser()
    if not os.path.isfile(path):
        raise DataError(
            f"data.tokenizer={name}: no such file; name a SentencePiece model file, t5, llama or train"
        )
    return check_size(Tokenizer(path), name, vocab_size)


def check_size(tokenizer: Tokenizer, name: str, vocab_size: int) -> Tokenizer:
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer={name}: its {tokenizer.vocab_size} pieces do not fit "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more, "
            "or choose a smaller tokenizer"
        )
    return tokenizer


def fetched(name: str, cfg: DataConfig) -> Path:
    """The model file of `t5` or `llama`: from our cache, Hugging Face's, or the hub."""
    repo, file = HUB_FILES[name]
    path = cache_dir(cfg) / "tokenizers" / f"{name}.model"
    note = path.with_suffix(".json")  # where it came from, and its hash
    if os.path.isfile(path):
        digest = json.loads(note.read_text())["hash"] if note.is_file() else None
        with open(path, "rb") as kept:
            if digest is None or hub.hash_of(kept, digest) == digest:
                return path
        log.warning("data.tokenizer=%s: %s is damaged, fetching it again", name, path)
        path.unlink()
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(repo, file)
    if isinstance(known, str):
        return Path(known)
    server = hub.Hub(endpoint(cfg))
    others = "use data.tokenizer=train or a SentencePiece model file"
    try:
        found = server.tree("model", repo, "", re.escape(file), None, hub.LIST_S)
        if file not in found.files:
            raise DataError(f"data.tokenizer={name}: no {file} in {repo} at {server.endpoint}; {others}")
        server.download(found, file, path, hub.LIST_S)
    except hub.Refused as error:
        reason = f"{repo} at {server.endpoint} does not give {file} ({error})"
        if error.status in (401, 403):
            others = f"it may be gated: get access on its page and set HF_TOKEN, or {others}"
        raise DataError(f"data.tokenizer={name}: {reason}; {others}") from error
    except (hub.Fault, hub.Offline) as error:
        raise DataError(
            f"data.tokenizer={name}: {repo}/{file} cannot be fetched from {server.endpoint} ({error}); "
            f"check the network and HF_ENDPOINT, or {others}"
        ) from error
    _kept(note, json.dumps({"repo": repo, "revision": found.revision, "hash": found.files[file][1]}).encode())
    return path


def trained(train: Source, vocab_size: int, cache: Path) -> Path:
    """A BPE model of `vocab_size` pieces from the first 50 MB of text; cached by content and settings."""
    texts, digest, size = [], hashlib.sha256(json.dumps([SETTINGS, vocab_size]).encode()), 0
    for text in train.documents(Damage(quiet=True)):
        texts.append(text.encode())
        digest.update(len(texts[-1]).to_bytes(8, "little") + texts[-1])
        size += len(texts[-1])
        if size >= TRAIN_BYTES:
            break
    path = cache / "tokenizers" / f"{digest.hexdigest()[:32]}.model"
    if os.path.isfile(path):
        return path
    log.info(
        "training a tokenizer of %d pieces on %.1f MB (about %.0f s)", vocab_size, size / 1e6, 1 + size * 7e-8
    )
    return _kept(path, train_model(_sentences(texts), vocab_size, size))


def train_model(sentences: Iterator[str], vocab_size: int, size: int) -> bytes:
    """The model file's bytes; DataError where the text does not yield `vocab_size` pieces."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, minloglevel=2, **SETTINGS
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2] or "no text"
        raise DataError(
            f"model.vocab_size={vocab_size}: {size / 1e6:.3g} MB of training text do not yield a tokenizer "
            f"of that size ({reason}); change model.vocab_size, give more text, or use data.tokenizer=FILE"
        ) from None
    return model.getvalue()


def _kept(path: Path, model: bytes) -> Path:
    try:
        write_atomic(path, model)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.cache={path.parent.parent}: a tokenizer cannot be kept there ({one_line(error)}); "
            "name another folder"
        ) from error
    return path


def _sentences(texts: list[bytes]) -> Iterator[str]:
    """Lines, cut where SentencePiece would ignore them as too long."""
    for text in texts:
        for line in text.split(b"\n"):
            for at in range(0, len(line), SENTENCE_BYTES):
                yield line[at : at + SENTENCE_BYTES].decode(errors="ignore")
