"""Hugging Face model folders: config.json as LlamaConfig's, *.safetensors with LlamaForCausalLM's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .config import ModelConfig
from .model import INIT_STD, Llama, empty_model

SHAPE_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "rms_norm_eps tie_word_embeddings"
).split()
REQUIRED = SHAPE_KEYS[:5]
# Types where a whole number is not the only one.
KINDS: dict[str, tuple[type, ...]] = {
    "rms_norm_eps": (float, int), "rope_theta": (float, int), "tie_word_embeddings": (bool,)
}  # fmt: skip
# What LlamaConfig can ask for and this model does not have, with the only value that is accepted.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # config.json: safetensors
Stored = tuple[Path, tuple[int, ...], str]  # file, shape, type of a stored tensor


class FolderError(ValueError):
    """A model folder or run folder cannot be used. Names the path, the reason and the way out."""


def resolve(path: str | Path) -> tuple[Path, Path]:
    """(model folder, tokenizer file) of a run folder, newest complete checkpoint, or of a model folder."""
    folder, root = model_folder(path), Path(path)
    if not (root / "tokenizer.model").is_file():
        raise FolderError(
            f"{root}: no tokenizer.model there; copy the SentencePiece file the model was trained with"
        )
    return folder, root / "tokenizer.model"


def model_folder(path: str | Path) -> Path:
    """The newest complete save of a run folder, or a model folder or save itself."""
    from .checkpoint import complete, latest

    root = Path(path)
    if not root.is_dir():
        raise FolderError(f"{root}: no such folder; give a run folder or a folder with config.json")
    folder: Path | None = root
    if (root / "checkpoints").is_dir():
        folder = latest(root, misfit)
        if folder is None and complete(root):
            raise FolderError(f"{root}: none of its saves can be used; train.py names the way out")
        if folder is None:
            raise FolderError(
                f"{root}: no complete checkpoint in checkpoints/ yet; train until the first save"
            )
    elif not (root / "config.json").is_file():
        raise FolderError(f"{root}: neither checkpoints/ nor config.json there; give a run or model folder")
    assert folder is not None
    return folder


def read_json(folder: Path, name: str = "config.json") -> dict:
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{path}: no such file; give a folder that holds a LLaMA in Hugging Face's layout"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise FolderError(f"{path}: not a JSON object")
    return content


def load_config(folder: str | Path) -> ModelConfig:
    """The shapes in folder/config.json. FolderError if it is no LLaMA or one this model cannot express."""
    folder = Path(folder)
    raw = read_json(folder)
    where = folder / "config.json"
    if raw.get("model_type") != "llama":
        raise FolderError(
            f"{where}: model_type={raw.get('model_type')!r} is not 'llama'; other models do not load"
        )
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise FolderError(f"{where}: {', '.join(missing)} missing; all of {', '.join(REQUIRED)} are needed")
    for key, only in FIXED.items():
        if raw.get(key, only) != only:
            raise FolderError(f"{where}: {key}={raw[key]!r} is not supported; only {only!r} is")
    # rope_scaling is older transformers' name; newer ones keep theta and scaling together
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise FolderError(f"{where}: rope_parameters={rope!r} is not an object; LlamaConfig's is one")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FolderError(f"{where}: rope_type={kind!r} is not supported; only 'default' is")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    known = {key: raw[key] for key in SHAPE_KEYS if raw.get(key) is not None}
    known["rope_theta"] = 10000.0 if theta is None else theta
    odd = [f"{key}={value!r}" for key, value in known.items() if type(value) not in KINDS.get(key, (int,))]
    if odd:
        raise FolderError(f"{where}: {', '.join(odd)[:200]}: a value of the wrong type; LlamaConfig's fit")
    cfg = ModelConfig(**known)
    problems = cfg.problems()
    if raw.get("head_dim") not in (None, cfg.hidden_size // max(1, cfg.num_attention_heads)):
        problems.append(f"head_dim={raw['head_dim']}: only hidden_size / num_attention_heads is supported")
    if problems:
        raise FolderError(f"{where}: " + "; ".join(problems))
    return cfg


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The shapes as keyword arguments of transformers' LlamaConfig."""
    return {
        **{key: getattr(cfg, key) for key in SHAPE_KEYS},
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        **FIXED,
    }


def config_text(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    seq_len: int = 2048,  # max_position_embeddings: the length trained at
) -> str:
    """The text of a config.json, which transformers and load_config read."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **hf_config(cfg),
        "rope_theta": cfg.rope_theta,  # where transformers 4 looks for it
        "max_position_embeddings": seq_len,
        "initializer_range": INIT_STD,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    return json.dumps(content, indent=2) + "\n"


def write_config(cfg: ModelConfig, folder: str | Path, **how: Any) -> None:
    """Writes folder/config.json; `how` as config_text takes it."""
    Path(folder, "config.json").write_text(config_text(cfg, **how), encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or without it the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        names = read_json(folder, index.name).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise FolderError(f"{index}: no weight_map in it")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                raise FolderError(f"{index}: {name!r} is no file of the folder; shards lie beside the index")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [folder / "model.safetensors"]
    absent = [str(f) for f in files if not f.is_file()]
    if not absent:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise FolderError(
            f"{folder}: only pickled weights there (*.bin, *.pt), which can run code when read; "
            "save the model again with transformers' save_pretrained, which writes safetensors"
        )
    raise FolderError(f"{', '.join(absent)}: no such file; the folder needs its weights as safetensors")


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Name -> (file, shape, type) of everything stored, without reading tensors."""
    found: dict[str, Stored] = {}
    for path in files:
        with open_file(path) as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                part = stored.get_slice(name)
                found[name] = path, tuple(part.get_shape()), part.get_dtype()
    return found


def misfit(save: Path) -> str:
    """Why a save's weights are not those that its config.json describes, by their headers; empty if they
    are."""
    try:
        cfg, raw, told = load_config(save), read_json(save), read_json(save, "state.json")["config"]
        trained = {**told["model"], "seq_len": told["seq_len"]}
        for key, value in {
            **vars(cfg),
            "num_key_value_heads": cfg.kv_heads,
            "seq_len": seq_len(save),
        }.items():
            if key not in ("init_from", "pad") and trained.get(key) not in (value, None):
                return f"config.json says {key}={value!r}, state.json {trained[key]!r}"
        wanted = {n: tuple(p.shape) for n, p in empty_model(cfg, "meta", torch.float32).named_parameters()}
        stored = stored_tensors([save / "model.safetensors"])
        problems = unlike(wanted, stored)
        kind = TYPES.get(str(raw.get("torch_dtype")))
        problems += [f"{n} is {s[2]}, config.json says {kind}" for n, s in stored.items() if s[2] != kind]
    except FolderError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return "state.json holds no shapes in its settings"
    return f"model.safetensors does not fit config.json: {'; '.join(problems[:3])}" if problems else ""


def unlike(wanted: dict[str, tuple[int, ...]], stored: dict[str, Stored]) -> list[str]:
    """What a model of these shapes misses among the stored tensors, or finds in another shape."""
    return [f"missing {n}" for n in wanted if n not in stored] + [
        f"{n} has shape {stored[n][1]}, the model's is {shape}"
        for n, shape in wanted.items()
        if n in stored and stored[n][1] != shape
    ]


def seq_len(folder: Path, default: int = 2048) -> int:
    """The length that a folder's model was trained at."""
    found = read_json(folder).get("max_position_embeddings", default)
    if type(found) is not int or not 1 <= found <= 10**9:
        raise FolderError(f"{folder / 'config.json'}: max_position_embeddings={found!r} is no length")
    return found


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library's own type for a damaged header
        raise FolderError(f"{path}: cannot be read as safetensors ({error})") from None


@torch.no_grad()
def load_weights(model: Llama, folder: str | Path) -> None:
    """Copy a folder's weights into the model, tensor by tensor, cast to the model's dtype, on its device.

    FolderError, before any weight is changed, names what is missing, unexpected or of another shape; in the
    middle of it, a weight with a NaN or an infinity, which could only spread. Two leftovers of older files
    are skipped: rotary inv_freq tables, and an lm_head equal to tied embeddings.
    """
    folder = Path(folder)
    wanted = model.weights()
    stored = stored_tensors(weight_files(folder))
    extra = {n for n in stored if n not in wanted and not n.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.cfg.tie_word_embeddings and head in extra and embedding in stored:
        if not torch.equal(_read(stored, head), _read(stored, embedding)):
            raise FolderError(
                f"{folder}: {head} differs from {embedding}, but config.json says they are tied"
            )
        extra.discard(head)
    problems = unlike({n: tuple(p.shape) for n, p in wanted.items()}, stored)
    problems += [f"unexpected {n}" for n in sorted(extra)]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise FolderError(f"{folder}: weights do not fit the model: {'; '.join(problems[:8])}{more}")
    for name, tensor in _stream(stored):
        if name in wanted:
            if not tensor.isfinite().all():
                raise FolderError(f"{stored[name][0]}: {name} holds numbers that are not finite")
            wanted[name].copy_(tensor)


def _read(stored: dict[str, Stored], name: str) -> torch.Tensor:
    with open_file(stored[name][0]) as handle:
        return handle.get_tensor(name)


def _stream(stored: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted({path for path, *_ in stored.values()}):
        with open_file(path) as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The widest dtype among a folder's weights."""
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kinds = {kind for _, _, kind in stored_tensors(weight_files(Path(folder))).values()}
    unknown = kinds - names.keys()
    if unknown:
        raise FolderError(
            f"{folder}: weights of type {', '.join(sorted(unknown))}; only {', '.join(names)} are read"
        )
    return max((names[kind] for kind in kinds), key=lambda t: t.itemsize)


def load_model(folder: str | Path, device: torch.device | str, dtype: torch.dtype | None = None) -> Llama:
    """The model of a folder, on device, in dtype (None: the dtype it is stored in)."""
    cfg = load_config(folder)
    model = empty_model(cfg, device, stored_dtype(folder) if dtype is None else dtype)
    load_weights(model, folder)
    return model
