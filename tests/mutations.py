"""What can happen to a save on disk: each function changes one and says what it did.

`rehash` makes the manifest right again, so that only a reader of the file itself can notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llama import checkpoint

FILES = ("config.json", "manifest.json", "model.safetensors", "optim.safetensors", "state.json")
TENSORS = ("model.safetensors", "optim.safetensors")
LONG = "x" * 5000
DECIDED = {"state.json: settings"}  # refused with the way out, an older save or not


@dataclass
class Mutation:
    kind: str
    file: str  # that a refusal names
    note: str = ""
    harmless: bool = False  # the same content: may be taken
    readers: bool = True  # eval, generate and export are asked too


Kind = Callable[[Path, Path, Path, random.Random], Mutation]  # save, saves of the run, of another, chance


def rehash(save: Path) -> None:
    path = save / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        raw = (save / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    path.write_text(json.dumps(manifest))


def named(file: str) -> str:
    """A change of the manifest itself may be said of any file."""
    return "" if file == "manifest.json" else file


def bits(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    name = rng.choice(FILES)
    raw = bytearray((save / name).read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 9])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    (save / name).write_bytes(raw)
    return Mutation("bits flipped", named(name), name, harmless=name == "manifest.json")  # white space


def size(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    name = rng.choice(FILES)
    raw = (save / name).read_bytes()
    how = rng.choice(["cut", "emptied", "longer"])
    new = {
        "cut": raw[: rng.randrange(len(raw))],
        "emptied": b"",
        "longer": raw + rng.randbytes(rng.choice([1, 99])),
    }
    (save / name).write_bytes(new[how])
    return Mutation(how, named(name), name)


def gone(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    name = rng.choice(FILES)
    (save / name).unlink()
    return Mutation("file deleted", name)


def special(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """Something else in the place of a file."""
    name = rng.choice(FILES)
    path, raw = save / name, (save / name).read_bytes()
    path.unlink()
    how = rng.choice(["folder", "pipe", "dead link", "loop", "link to a folder", "link to another", "link"])
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        (save.parent.parent / "moved").write_bytes(raw)
        path.symlink_to(save.parent.parent / "moved")
    else:
        to = {
            "dead link": "nowhere",
            "loop": path.name,
            "link to a folder": "..",
            "link to another": other / save.name / name,
        }
        path.symlink_to(to[how])
    harmless = how == "link" or how == "link to another" and raw == path.read_bytes()
    return Mutation(f"a {how}", named(name) if how == "link to another" else name, harmless=harmless)


def swapped(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """A file of another step, or of another run at the same step."""
    name = rng.choice(FILES)
    before = (save / name).read_bytes()
    source = rng.choice([own / "step_00000002", own / "step_00000006", other / save.name])
    shutil.copyfile(source / name, save / name)
    harmless = before == (save / name).read_bytes()
    return Mutation("file of another save", named(name), f"{source}", harmless)


def whole_folder(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    how = rng.choice(
        ["another step", "another method", "empty", "file", "link", "dead link", "later", "index", "old"]
    )
    aside = save.parent.parent / "aside"
    if how in ("later", "index", "old"):
        if how == "later":
            shutil.copytree(save, save.with_name("step_00000099"))
            return Mutation("folder of later name", "state.json")
        if how == "old":
            save.with_name("step_00000009.old").write_text("x")
            save.with_name("step_00000008.tmp").write_text("x")
            return Mutation("litter", "", harmless=True)
        shutil.copyfile(own / "step_00000002" / "model.safetensors", save / "else.safetensors")
        names = dict.fromkeys(load_file(save / "else.safetensors"), "else.safetensors")
        (save / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return Mutation("index beside the weights", "", harmless=True)
    shutil.move(save, aside)
    if how == "another step":
        shutil.copytree(own / "step_00000002", save)
    elif how == "another method":
        shutil.copytree(other / save.name, save)
        return Mutation("state.json: settings", "", "save of another method", readers=False)
    elif how == "empty":
        save.mkdir()
    elif how == "file":
        save.write_text("x")
    else:
        save.symlink_to(aside if how == "link" else "nowhere")
    return Mutation(f"folder: {how}", "", how, harmless=how == "link")


def manifest(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """Wrong types, sizes and names in the manifest; the files are as they were."""
    path = save / "manifest.json"
    files: Any = json.loads(path.read_text())["files"]
    name = rng.choice(sorted(files))
    entry, harmless = files[name], False
    text = ""
    how = rng.choice("types entry bytes sha name drop double text".split())
    if how == "types":
        files = rng.choice([[], None, 7, "x", [name], {}, True, {name: entry}])
    elif how == "entry":
        files[name] = rng.choice(
            [None, 7, "x", [], {}, {"bytes": entry["bytes"]}, {"sha256": entry["sha256"]}]
        )
    elif how == "bytes":
        entry["bytes"] = rng.choice(
            [-1, 0, 2**63, 10**400, "7", None, [], 1.5, float("nan"), float("inf"), "\n" * 999]
        )
    elif how == "sha":
        entry["sha256"] = rng.choice([0, None, "", [], "0" * 64, entry["sha256"].upper(), LONG])
    elif how == "name":
        trick = rng.choice(
            ["../../config.yaml", "/etc/passwd", "", ".", "..", "a\0b", "a/b", "./state.json", LONG, "\udcff",
             "a\nb", "../step_00000002/state.json", "~", "*", "manifest.json", "C:\\x"]
        )  # fmt: skip
        files[trick] = entry
    elif how == "drop":
        del files[name]
    elif how == "double":
        text = json.dumps({"files": files})
        text = text.replace(f'"{name}"', f'"{name}": {rng.choice(["7", json.dumps(entry)])}, "{name}"', 1)
        harmless = True  # the last one counts
    else:
        text = rng.choice(
            ["{", "[]", "null", "7", "[" * 100_000, "9" * 5000, "\ufeff{}", '{"files": {"files": {}}}']
        )
    raw = (text or json.dumps({"files": files})).encode("utf-8", "surrogatepass")
    path.write_bytes(b"\xff\xfe" + raw if rng.random() < 0.03 else raw)
    return Mutation(
        f"manifest: {how}",
        "" if harmless else "manifest.json" if how in ("types", "text") else "",
        how,
        harmless,
    )


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def join(path: Path, header: object, data: bytes, length: int | None = None, text: str = "") -> None:
    raw = (text or json.dumps(header)).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def header(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """The header of a file of tensors, all hashes right."""
    name = rng.choice(TENSORS)
    path = save / name
    head, data = split(path)
    tensors = sorted(set(head) - {"__metadata__"})
    big = [t for t in tensors if len(head[t]["shape"]) == 2]
    which = rng.choice(big)
    t, length, text = head[which], None, ""
    begin, end = t["data_offsets"]
    how = rng.choice(
        "length offsets overlap negative turned hole dtype unknown flat extra huge lost added renamed "
        "text".split()
    )
    if how == "length":
        length = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(data) + 10**6])
    elif how == "offsets":
        t["data_offsets"] = [begin + 10**9, end + 10**9]
    elif how == "overlap":
        t["data_offsets"] = [max(0, begin - 8), end - 8]
        if begin == 0:
            t["data_offsets"] = [8, end + 8]
    elif how == "negative":
        t["data_offsets"] = rng.choice([[-8, end], [begin, -1], [begin, 1e99], ["0", end], None])
    elif how == "turned":
        t["data_offsets"] = [end, begin]
    elif how == "hole":
        data += b"\0" * 64
    elif how == "dtype":
        same = {4: ["I32", "U32"], 2: ["F16", "I16"], 1: ["BOOL", "F8_E4M3"]}
        size = (end - begin) // max(1, t["shape"][0] * t["shape"][1])
        t["dtype"] = rng.choice([d for d in same.get(size, ["F32"]) if d != t["dtype"]])
    elif how == "unknown":
        t["dtype"] = rng.choice(["F7", "", None, 4, "f32"])
    elif how == "flat":
        t["shape"] = [t["shape"][0] * t["shape"][1]]
    elif how == "extra":
        t["shape"] = [1, *t["shape"]]
    elif how == "huge":
        t["shape"] = rng.choice([[2**63, 2**63], [-1, -1], [2**32, 2**32], [0, 0], "x", [1.5]])
    elif how == "lost":
        del head[which]
    elif how == "added":
        head["model.more"] = {"dtype": "U8", "shape": [8], "data_offsets": [len(data), len(data) + 8]}
        data += b"12345678"
    elif how == "renamed":
        head[f"{which}x"] = head.pop(which)
    else:
        text = rng.choice(
            ["[]", "{", "null", "{}", "\u00e9" * 9, "[" * 50_000, '{"a": 1}', '{"__metadata__": 7}']
        )
    join(path, head, data, length, text)
    rehash(save)
    return Mutation(f"header of tensors: {how}", name, which, readers=name == TENSORS[0])


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    path.write_bytes(b"".join(bytes(part) for part in checkpoint.safetensors(tensors)))


def cast(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """One tensor in another type or shape, the file well-formed, all hashes right."""
    name = rng.choice(TENSORS)
    tensors = load_file(save / name)
    floats = [k for k, t in tensors.items() if t.is_floating_point() and t.ndim]
    which = rng.choice(floats)
    how = rng.choice(["bf16", "fp16", "fp64", "int64", "shorter", "transposed", "empty"])
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64, "int64": torch.int64}

    def change(t: dict[str, torch.Tensor]) -> None:
        x = t[which]
        if how in kinds:
            t[which] = x.to(kinds[how])
        else:
            t[which] = {"shorter": x[:-1], "transposed": x[None].mT, "empty": x[:0]}[how].contiguous()

    rewrite(save / name, change)
    rehash(save)
    return Mutation(f"tensor of other type or shape: {how}", name, which, readers=name == TENSORS[0])


def not_finite(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    tensors = load_file(save / TENSORS[0])
    which, value = rng.choice(sorted(tensors)), rng.choice([float("nan"), float("inf"), -float("inf")])
    rewrite(save / TENSORS[0], lambda t: t[which].view(-1)[:1].fill_(value))
    rehash(save)
    return Mutation("weights not finite", TENSORS[0], which)


def other_state(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """The optimizer's state of another method, hashes right."""
    shutil.copyfile(other / save.name / TENSORS[1], save / TENSORS[1])
    rehash(save)
    return Mutation("optimizer state of another method", "optimizer state", readers=False)


BAD = [None, True, "4", 4.0, 4.5, -4, 5, 2, 10**30, [], {}, float("nan")]


def state(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    path = save / "state.json"
    s: Any = json.loads(path.read_text())
    how = rng.choice(
        ["text", "step", "lost", "types", "position", "position", "position", "spike", "settings"]
    )
    text = ""
    if how == "text":
        text = rng.choice(["", "{", "[]", "null", "7", "[" * 100_000, "9" * 5000, "\ufeff{}", '"x"'])
    elif how == "step":
        s["step"] = rng.choice(BAD)
    elif how == "lost":
        del s[rng.choice(["step", "data", "stream", "tokens", "config"])]
    elif how == "types":
        key = rng.choice(["data", "stream", "tokens", "config"])
        s[key] = rng.choice(
            {
                "data": [[], 7, "x"],
                "stream": [7, None, []],
                "tokens": ["7", None, -1, 1.5],
                "config": [[], None, 7],
            }[key]
        )
    elif how == "position":
        place = s["data"]
        key = rng.choice([k for k in place if k != "of"])
        change = rng.randrange(5)
        if change == 0:
            place[key] = rng.choice([-1, "0", None, 1.5, True, [], 10**30])
        elif change == 1:
            place[rng.choice(["file", "row"])] = rng.choice([10**6, 10**9])
        elif change == 2:
            del place[rng.choice(["epoch", "file", "record", "block", "documents", "damaged", "document"])]
        elif change == 3:
            place["more"] = 1
        else:
            place["of"] = rng.choice([None, [], "x"])
    elif how == "spike":
        s["spike"] = rng.choice(
            [[], None, 7, {"losses": 7}, {"losses": ["x"]}, {"high": "x"}, {"losses": [[]]}]
        )
    else:
        c = rng.choice(["other", "seed", "empty", "odd"])
        if c == "other":
            s["config"]["optim"] = json.loads((other / save.name / "state.json").read_text())["config"][
                "optim"
            ]
        elif c == "seed":
            s["config"]["seed"] = 5
        elif c == "empty":
            s["config"] = {}
        else:
            s["config"]["optim"] = rng.choice([None, 7, [], "x", {"name": 7}, {"name": {}}])
    path.write_text(text or json.dumps(s) if how != "text" else text)
    rehash(save)
    return Mutation(
        f"state.json: {how}",
        "" if how == "settings" else "state.json",
        str(s)[:0],
        readers=how != "settings" and how != "position",
    )


def config(save: Path, own: Path, other: Path, rng: random.Random) -> Mutation:
    """config.json, hashes right: of other shapes, types, or none."""
    path = save / "config.json"
    c = json.loads(path.read_text())
    text = ""
    if rng.random() < 0.3:
        text = rng.choice(["", "[]", "{", "null", "[" * 100_000, "{}", '{"model_type": "llama"}'])
    else:
        key, value = rng.choice(
            [("hidden_size", 64), ("hidden_size", "32"), ("num_hidden_layers", 1), ("vocab_size", 385),
             ("rms_norm_eps", 0.01), ("rms_norm_eps", None), ("rms_norm_eps", "x"),
             ("torch_dtype", "bfloat16"), ("torch_dtype", 7), ("max_position_embeddings", "x"),
             ("max_position_embeddings", -5),
             ("max_position_embeddings", 4), ("num_attention_heads", 4), ("num_key_value_heads", 1),
             ("tie_word_embeddings", True), ("model_type", "gpt2"), ("rope_parameters", [7]),
             ("rope_parameters", {"rope_theta": 3.0}), ("rope_parameters", {"rope_theta": "x"}),
             ("head_dim", 3)]
        )  # fmt: skip
        c[key] = value
        text = json.dumps(c)
    path.write_text(text)
    rehash(save)
    return Mutation("config.json", "config.json", text[:60], harmless='"rms_norm_eps": null' in text)


KINDS: list[Kind] = [
    bits, bits, bits, size, size, gone, special, special, swapped, swapped, whole_folder, manifest, manifest,
    manifest, header, header, header, cast, cast, not_finite, other_state, state, state, state, config,
]  # fmt: skip
