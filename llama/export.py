"""A trained model as a folder that transformers' LlamaForCausalLM (and model.init_from) loads.

Command: python -m llama.export RUN|FOLDER OUT

Writes OUT/config.json, generation_config.json, model.safetensors, tokenizer.model, and tokenizer.json with
tokenizer_config.json for AutoTokenizer. Then loads it with transformers in fp32, compares the logits of a
text, and only then says done. OUT appears complete or not at all: it is written aside and renamed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .model import Llama
from .pretrained import FolderError, load_model, resolve, seq_len, write_config

USAGE = "usage: python -m llama.export RUN|FOLDER OUT"
# What the two sides are compared on; the second part tries what tokenizers disagree about.
TEXT = "The quick brown fox jumps over the lazy dog, it is 1984.  Two spaces,\ttab,\nline; na\u00efve \u6f22."
TOLERANCE = 1e-4  # largest difference of logits over the largest logit, fp32; 2e-6 is usual


def write_folder(model: Llama, out: Path, tokenizer: Any, tokenizer_file: Path, seq_len: int) -> str:
    """Fill out/ with everything but tokenizer.json's verdict, which is returned: a sentence for the user."""
    dtype = model.head_weight.dtype
    eos, pad = tokenizer.eos_id, tokenizer.pad_id
    write_config(model.cfg, out, dtype=dtype, eos_token_id=eos, pad_token_id=pad, seq_len=seq_len)
    generation = {
        "eos_token_id": eos,
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    state = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(out / "config.json", out / "model.safetensors")  # safetensors makes it the owner's alone
    shutil.copyfile(tokenizer_file, out / "tokenizer.model")
    return write_tokenizer(out, tokenizer)


def write_tokenizer(out: Path, tokenizer: Any) -> str:
    """tokenizer.json and its settings from out/tokenizer.model; left out unless they give the same ids."""
    try:
        converted = convert(out / "tokenizer.model")
    except ImportError as error:
        return f"tokenizer.json not written: {error.name} is not installed"
    expected, got = list(tokenizer.encode(TEXT)), converted.encode(TEXT, add_special_tokens=False).ids
    if expected != got:
        return "tokenizer.json not written: it would give other ids than tokenizer.model"
    converted.save(str(out / "tokenizer.json"))
    pieces = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: converted.id_to_token(i) for key, i in pieces.items() if i is not None},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return "tokenizer.json gives the ids of tokenizer.model"


def convert(path: Path) -> Any:
    """A tokenizers.Tokenizer that does what the SentencePiece model does, unigram or BPE."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto: Any = sentencepiece_model_pb2
    spm = proto.ModelProto.FromString(path.read_bytes())
    train, normal = spm.trainer_spec, spm.normalizer_spec
    pieces = [(p.piece, p.score) for p in spm.pieces]
    unknown = next(i for i, p in enumerate(spm.pieces) if p.type == p.UNKNOWN)
    if train.model_type == train.UNIGRAM:
        result = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=train.byte_fallback))
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        splits = [(p[:i], p[i:]) for p, _ in sorted(pieces, key=lambda x: -x[1]) for i in range(1, len(p))]
        merges = [(a, b) for a, b in splits if a in ids and b in ids]
        result = Tokenizer(
            models.BPE(
                ids, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=train.byte_fallback
            )
        )
    steps: list[Any] = (
        [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    )
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    result.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tail = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    result.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    control = [p.piece for p in spm.pieces if p.type == p.CONTROL]
    result.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return result


@torch.no_grad()
def fp32_logits(model: Any, ids: Tensor) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def difference(model: Llama, folder: Path, ids: Tensor) -> float:
    """Largest difference of logits over the largest logit: the model against what transformers loads."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours = fp32_logits(model.float(), ids)
    theirs = fp32_logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def export(source: Path, out: Path, tokenizer: Any, tokenizer_file: Path) -> str:
    """Write `out` from the model folder `source` and verify it; FolderError and no `out` if it disagrees.

    Returns what to tell the user. Needs transformers; memory: the model in fp32 twice.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise FolderError(
            "transformers is not installed, so the export could not be compared: pip install transformers"
        ) from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out}: exists and is not empty; give another folder or remove it")
    model = load_model(source, "cpu")
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise FolderError(
            f"{tokenizer_file}: {tokenizer.vocab_size} pieces, the model has {model.cfg.vocab_size}; "
            "it is not the tokenizer the model was trained with"
        )
    ids = torch.tensor([tokenizer.encode(TEXT)[:64]])
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by an export that was killed
    aside.mkdir(parents=True)
    try:
        verdict = write_folder(model, aside, tokenizer, tokenizer_file, seq_len(source))
        error = difference(model, aside, ids)
        if not error <= TOLERANCE:  # NaN too
            raise FolderError(
                f"{source}: transformers' logits differ by {error:.1e} of the largest; nothing exported"
            )
        if out.is_dir():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return (
        f"{verdict}\nlogits equal to {error:.1e} of the largest on {ids.shape[1]} tokens, fp32\ndone: {out}"
    )


def main(argv: list[str] | None = None) -> int:
    from data import DataError, Tokenizer

    args = sys.argv[1:] if argv is None else argv
    try:
        if len(args) != 2:
            raise FolderError(USAGE)
        source, tokenizer_file = resolve(args[0])
        print(export(source, Path(args[1]), Tokenizer(str(tokenizer_file)), tokenizer_file))
    except (FolderError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
