"""Command lines for tests/fuzz.py, on a small model and corpus: invalid ones of many kinds, valid ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.groups import GROUPS, group_options
from configs.values import show
from tests.fuzz_place import Place
from tests.lines import FLOATS, INTS, KNOWN, OUTSIDE, PROJECTED, invalid_ones

METHODS = group_options("optim")
RANKED = {"optim.rank": "8", "optim.refresh_every": "4"}


@dataclass
class Case:
    kind: str
    argv: list[str]
    named: list[str]  # all of them in one line of stderr
    late: bool = False  # found when the data or the model is built: the run's folder is there by then


def invalid(place: Place, rng: random.Random) -> Case:
    """A line that is wrong for one reason, at the run that is there or at a new one."""
    case = rng.choice(KINDS)(place, rng)
    if not any(arg.startswith(("run.", "++run.")) for arg in case.argv if arg not in place.line()):
        if rng.random() < 0.5 and case.kind != "changed against a save":
            fresh = {f"run.dir={place.runs}": f"run.dir={place.new}", "run.name=r": "run.name=n"}
            case.argv = [fresh.get(arg, arg) for arg in case.argv]
    if rng.random() < 0.5:
        rng.shuffle(case.argv)
    return case


def typed(value: str) -> str:
    """As a message repeats it, at least in part."""
    return show(value)[:100].removesuffix("...")


def argument(place: Place, rng: random.Random) -> Case:
    arg, key, value = rng.choice(invalid_ones(rng.randrange(50)))
    ranked = key in PROJECTED and arg.lstrip("+").startswith(f"{key}=")
    kind = "wrong type or syntax"
    if value in OUTSIDE.get(key, ()):
        kind = "value outside its range"
    elif key.lstrip("~") in GROUPS:
        kind = "unknown option"
    elif value == "null":
        kind = "null where none may be"
    elif key not in KNOWN:
        kind = "unknown key, flag or deletion"
    return Case(kind, place.line(arg, *(["optim=galore"] if ranked else [])), [key, typed(value)])


CLASHES: list[tuple[list[str], str, bool]] = [
    (["optim.clip=1", "optim.clip_mode=off"], "optim.clip=1", False),
    (["optim.clip_mode=two_pass"], "optim.clip_mode=two_pass", False),
    (["optim.clip=1", "optim.update=in_backward"], "optim.update=in_backward", False),
    (["optim.clip=1", "optim.clip_mode=two_pass", "optim.update=after"], "optim.update=after", False),
    (["optim.embed_moments=fp32"], "optim.embed_moments=fp32", False),
    (["optim.schedule=constant", "optim.min_lr_ratio=0.5"], "optim.min_lr_ratio=0.5", False),
    (["optim.lr_range=true", "optim.warmup=0.5"], "optim.warmup=0.5", False),
    (["optim.lr_range=true", "optim.schedule=linear"], "optim.schedule=linear", False),
    (["tokens_per_step=50"], "tokens_per_step=50", False),
    (["micro_batch=3"], "micro_batch=3", False),
    (["seq_len=13"], "seq_len=13", False),
    (["activations.checkpoint=0.01"], "activations.checkpoint=0.01", False),
    (["model.num_attention_heads=3"], "model.num_attention_heads=3", False),
    (["model.hidden_size=33"], "model.hidden_size=33", False),
    (["model.num_key_value_heads=5"], "model.num_key_value_heads=5", False),
    (["optim=gradnormlorp", "optim.side=both"], "optim.side=both", False),
    (["optim=galore", "optim.growth_limit=0.5"], "optim.growth_limit=0.5", False),
    (
        ["optim=gradnormlorp_adapter", "optim.project=false", "optim.finder=svd"],
        "optim.finder=svd",
        False,
    ),
    (
        ["optim=gradnormlorp_adapter", "optim.normalize=false", "optim.mag_scale=0.5"],
        "optim.mag_scale=0.5",
        False,
    ),
    (["optim=gradnormlorp_adapter", "optim.rank=4", "optim.core_rank=8"], "optim.core_rank=8", False),
    (["optim=gradnormlorp_adapter", "optim.lift=auto"], "optim.lift=auto", False),
    (["optim=galore", "optim.lift=deferred", "optim.side=paper"], "optim.lift=deferred", False),
    (["optim=adarankgrad", "optim.refresh=together"], "optim.refresh=together", False),
    (["optim=galore", "activations=velora", "optim.growth_limit=1.1"], "optim.growth_limit=1.1", True),
    (["activations=velora", "activations.group=7"], "activations.group=7", True),
    (["activations=velora", "activations.layers=[w]"], "activations.layers=[w]", False),
    (["activations.group=8"], "activations.group=8", False),
    (["optim=galore", "optim.rank=64"], "rank=64", True),
    (["optim=galore", "optim.rank=65536"], "rank=65536", True),
    (["optim.clip=1", "optim.clip_mode=two_pass"], "clip_mode=two_pass", True),
    (["data.path=x"], "data.path=x", False),
    (["data=sample", "data.train=x"], "data.train=x", False),
    (["data=c4", "data.validation=x"], "data.validation=x", False),
    (["data=tokens", "data.train=x", "data.tokenizer=train"], "data.tokenizer=train", False),
    (["data=tokens", "data.train=x", "data.workers=2"], "data.workers=2", False),
    (["data=local", "data.train=x"], "data.validation=null", False),
    (["model.vocab_size=300000"], "model.vocab_size=300000", True),
]


def clash(place: Place, rng: random.Random) -> Case:
    args, named, late = rng.choice(CLASHES)
    # "changed" comes first at the run that is there: these are for a new one
    run = {"dir": str(place.new), "name": "n"} if late else {}
    return Case("clash", place.line(*args, **run), [named], late)


OTHERS = {
    "adamw": "rank refresh_every side share finder growth_limit mag_scale merge_every".split(),
    "adamw_8bit": "rank transport basis_dtype normalize".split(),
    "galore": "mag_scale merge_every core_rank project".split(),
    "galore_sgd": "mag_scale normalize detach_norm".split(),
    "gradnormlorp": "merge_every core_rank project normalize".split(),
    "gradnormlorp_adapter_8bit": "side share".split(),
}


def of_another_method(place: Place, rng: random.Random) -> Case:
    method = rng.choice(list(OTHERS))
    key, value = f"optim.{rng.choice(OTHERS[method])}", rng.choice(["1", "true", "input", "0.5"])
    return Case("key of another method", place.line(f"optim={method}", f"{key}={value}"), [f"{key}={value}"])


def doubled(place: Place, rng: random.Random) -> Case:
    argv = place.line()
    key, _, value = rng.choice(argv).partition("=")
    value = value if key in GROUPS else str(rng.randrange(1, 1000))
    where = rng.randrange(len(argv) + 1)
    return Case("doubled key", [*argv[:where], f"{key}={value}", *argv[where:]], [key, "given twice"])


def quoting(place: Place, rng: random.Random) -> Case:
    key = rng.choice([k for k in KNOWN if k not in PROJECTED])
    value = rng.choice(
        ["'a", '"a', "[a", "{a:", "{a:1", "[a,", "a]", "a}", "'a'b'", "${", "a\\'b'", "(", "int(x"]
    )
    value = value.replace("a", rng.choice(["a", "xy", "7 7", "\u00e9", "0.1"]))
    return Case("broken quoting", place.line(f"{key}={value}"), [key, typed(value)])


def huge(place: Place, rng: random.Random) -> Case:
    key = rng.choice(INTS + FLOATS)
    number = rng.choice(["9" * rng.randrange(20, 6000), "1" + "0" * rng.randrange(12, 400)])
    if key in FLOATS:
        number = rng.choice([number, f"1e{rng.randrange(30, 10**6)}", "inf", "1e999"])
    return Case("huge number", place.line(f"{key}={rng.choice(['', '-'])}{number}"), [key, typed(number)])


def strange(place: Place, rng: random.Random) -> Case:
    """Unicode, newlines, control characters and NUL where they cannot be meant."""
    odd = rng.choice(
        "\u00e9 \u4f60 \U0001f600 \u0663 \u00bd \u202e \ufeff \x00 \x1b \x7f \n \r \udcff \ue000".split(" ")
    )
    how = rng.randrange(4)
    if how == 0:
        key = rng.choice(KNOWN)
        name = f"{key[:3]}{odd}{key[3:]}"
        return Case("strange characters", place.line(f"{name}=1"), [typed(name)])
    if how == 1:
        key = rng.choice(INTS + FLOATS)
        return Case("strange characters", place.line(f"{key}={odd}"), [key])
    if how == 2 and not odd.isprintable():
        key = rng.choice(["run.name", "run.dir"])
        return Case("strange characters", place.line(f"{key}=a{odd}b"), [key])
    key = rng.choice(["data.train", "data.validation", "data.tokenizer", "data.cache"])
    odd = odd if key != "data.cache" else "\0"  # any other makes a folder
    value = f"{place.folder}/no{odd}such"
    return Case("strange characters", place.line(f"{key}={value}"), [key], late=True)


def long(place: Place, rng: random.Random) -> Case:
    key = rng.choice(
        "data.train data.validation data.tokenizer data.cache run.dir run.name model.init_from steps".split()
    )
    value = rng.choice("xyz") * rng.choice([300, 4097, 20_000, 10**5])
    if key == "run.dir" and rng.random() < 0.5:
        value = "/".join([value[:200]] * 30)
    new = {} if key.startswith("run.") else {"dir": str(place.new), "name": "n"}
    return Case("very long value", place.line(f"{key}={value}", **new), [key, value[:100]], late=True)


def data(place: Place, rng: random.Random) -> Case:
    f = place.folder
    args = rng.choice(
        [
            *[[f"{k}={v}"] for k in ("data.train", "data.validation") for v in (
                f"{f}/missing.jsonl", f"{f}/no/*.jsonl", f"{f}", f"{f}/empty", f"{f}/text.bin", "/dev/null",
                f"[{f}/train.jsonl,{f}/missing.jsonl]", "/proc/none", f"{f}/train.jsonl/x", "7",
            )],
            [f"data.validation={f}/train.jsonl"],
            *[[f"data.tokenizer={v}"] for v in (
                f"{f}/missing.model", f"{f}", f"{f}/train.jsonl", f"{f}/zero.model", "/dev/null", "t6",
                f"{f}/train.jsonl/x",
            )],
            *[[f"data.train={v}", "data=tokens"] for v in (
                f"{f}/missing", f"{f}/empty", f"{f}/train.jsonl", f"{f}/broken_tokens", f"[{f},{f}]",
            )],
            [f"data.validation={f}/empty", "data=tokens", f"data.train={f}/tokens"],
            *[[f"data.path={v}", "data=c4"] for v in (f"{f}/missing", f"{f}/empty", f"{f}/zero.model")],
            [f"data.cache={f}/zero.model"], ["data.cache=/proc/none"],
        ]
    )  # fmt: skip
    key, _, value = args[0].partition("=")
    named = value.strip("[]").split(",")[-1]
    return Case("data that is none", place.line(*args, dir=str(place.new), name="n"), [key, named], late=True)


def init(place: Place, rng: random.Random) -> Case:
    path = rng.choice([*place.models, f"{place.folder}/missing", f"{place.folder}/train.jsonl", "/"])
    late = Path(path).name in ("no_weights", "pickled", "garbage", "elsewhere")
    argv = place.line(f"model.init_from={path}", dir=str(place.new), name="n")
    return Case("init_from of no model", argv, [f"model.init_from={path}"], late)


def run_tricks(place: Place, rng: random.Random) -> Case:
    name = rng.choice(
        ["a/b", "..", ".", "../up", "/tmp/x", "r/", "r/..", "-r", "~/x", "x" * 201, "r/checkpoints", "a\\\\b"]
    )
    f = place.folder
    args = rng.choice(
        [[f"run.name={name}"], [f"run.dir={f}/train.jsonl"], ["run.dir=/proc/x"], ["run.dir=/dev/null"],
         [f"run.dir={f}", "run.name=zero.model"]]
    )  # fmt: skip
    key, _, value = args[0].partition("=")
    return Case("run.name or run.dir that is none", place.line(*args), [key, typed(value)])


CHANGES = (
    "tokens_per_step=128 tokens_per_step=32 seq_len=32 seed=1 seed=77 data.packing=paper "
    "model.hidden_size=64 model.intermediate_size=48 model.num_hidden_layers=3 model.rope_theta=500.0 "
    "model.rms_norm_eps=0.001 model.tie_word_embeddings=True weights=bf16 "
    "model.num_attention_heads=4 model.vocab_size=400 model.num_key_value_heads=1"
).split()


def changed(place: Place, rng: random.Random) -> Case:
    if rng.random() < 0.3:
        method = rng.choice([m for m in METHODS if not m.startswith("adamw")])
        return Case("changed against a save", place.line(f"optim={method}"), [f"optim.name={method}: was "])
    args = rng.sample(CHANGES, 1)
    more = rng.choice([[], ["steps=9"], ["optim.lr=0.1"], ["keep_last=1"]])
    return Case("changed against a save", place.line(*args, *more), [f"{args[0]}: was "])


# Weighted by how much there is to vary.
KINDS: list[Callable[[Place, random.Random], Case]] = [
    *[argument] * 8, *[clash] * 2, *[of_another_method] * 2, doubled, *[quoting] * 2, *[huge] * 2,
    *[strange] * 2, long, *[data] * 2, init, run_tricks, changed,
]  # fmt: skip


def valid(place: Place, rng: random.Random, name: str) -> list[str]:
    """One step of a method with a legal choice for some of its keys."""
    method = rng.choice(METHODS)
    micro, seq, parts = rng.choice([1, 2, 3]), rng.choice([8, 16, 24]), rng.choice([1, 1, 2, 3])
    given: dict[str, object] = {
        "optim": method, "steps": 1, "micro_batch": micro, "seq_len": seq,
        "tokens_per_step": micro * seq * parts, "seed": rng.choice([0, 7, 2**31 - 1]),
    }  # fmt: skip
    pick: dict[str, list[object]] = {
        "optim.lr": ["1e-3", "0.01", "null"],
        "optim.scale": ["0.25", "1"],
        "optim.beta1": ["0", "0.9"],
        "optim.beta2": ["0", "0.95"],
        "optim.eps": ["1e-6", "1"],
        "optim.decay": ["0", "0.1", "1"],
        "optim.moments": ["fp32", "bf16", "int8"],
        "optim.rounding": ["stochastic", "nearest"],
        "optim.schedule": ["cosine", "linear", "constant"],
        "optim.warmup": ["0", "0.5", "1"],
        "optim.update": ["null", "after", "in_backward"],
        "activations.checkpoint": ["0", "0.5", "1"],
        "data.packing": ["dense", "paper"],
        "weights": ["null", "bf16", "fp32"],
        "spike": ["off", "skip", "rewind"],
        "deterministic": ["true", "false"],
        "keep_last": ["1", "5"],
        "save_minutes": ["0", "1"],
        "eval_every": ["1", "10"],
        "log": ["none", "none", "none", "tensorboard"],
        "model.num_key_value_heads": ["1", "2", "null"],
        "model.tie_word_embeddings": ["true", "false"],
        "profile": ["false", "false", "false", "true"],
        "graph": ["auto", "off"],
        "model.pad": ["null", "true", "false"],
        "activations": ["plain", "velora"],
        "activations.recompute": ["none", "down"],
    }
    if not method.startswith("adamw"):
        given |= RANKED | {"optim.rank": rng.choice(["1", "4", "8", "31"])}
        pick |= {
            "optim.refresh": ["staggered", "together"],
            "optim.finder": ["warm", "svd", "randomized"],
            "optim.transport": ["auto", "keep", "reset", "rotate", "rotate_fill"],
            "optim.growth_limit": ["0", "1.01", "1000"],
            "optim.basis_dtype": ["null", "bf16", "fp32"],
        }
        if "adapter" not in method:
            pick["optim.lift"] = ["now", "auto"]
    if method.startswith("adarankgrad"):
        pick |= {
            "optim.refresh": ["staggered"],
            "optim.transport": ["auto", "keep", "reset", "rotate", "rotate_fill"],
        }
        pick |= {"optim.energy": ["0.5", "0.9", "1"], "optim.monotone": ["true", "false"]}
    if method == "galore_sgd":
        del pick["optim.transport"], pick["optim.moments"]  # it has no moments in a basis
    if method.startswith("gradnormlorp"):
        pick["optim.mag_scale"] = ["0", "0.25", "1"]
    if "adapter" in method:
        pick |= {"optim.merge_every": ["null", "1", "3"], "optim.detach_norm": ["true", "false"]}
    elif not method.startswith("adamw"):
        sides = ["input", "output", "paper", "long"] + ["both"] * (not method.startswith("gradnormlorp"))
        pick |= {"optim.side": sides, "optim.share": ["true", "false"]}
    given |= {key: rng.choice(pick[key]) for key in rng.sample(sorted(pick), rng.randrange(2, len(pick)))}
    clip(given, method, parts, rng)
    if given.get("activations") == "velora":
        given.pop("optim.growth_limit", None)
    if given.get("activations.recompute") == "down" and given.get("activations.checkpoint") == "1":
        given["activations.checkpoint"] = "0.5"
    if given.get("spike") == "rewind":  # needs a save from before a spike
        given["keep_last"] = "5"
    if rng.random() < 0.3:
        given |= {"data": "tokens", "data.train": place.tokens}
    return place.line(*(f"{k}={v}" for k, v in given.items()), dir=str(place.new), name=name)


def clip(given: dict[str, object], method: str, parts: int, rng: random.Random) -> None:
    """A clip mode with what goes with it."""
    modes = (
        ["exact", "two_pass"]
        if method.startswith("adamw")
        else ["global_estimated", "projected", "per_layer"]
    )
    mode = rng.choice(modes)
    if mode == "two_pass" and parts > 1:
        mode = "exact"
    if rng.random() < 0.5:
        given |= {"optim.clip": rng.choice(["1", "0.1", "1e6"]), "optim.clip_mode": mode}
        if given.get("optim.update") == ("after" if mode == "two_pass" else "in_backward") and mode in (
            "two_pass",
            "exact",
        ):
            given["optim.update"] = "null"
    elif rng.random() < 0.3:
        given["optim.clip_mode"] = "off"
    if given.get("optim.schedule") != "constant" and rng.random() < 0.3:
        given["optim.min_lr_ratio"] = rng.choice(["0", "1"])
    if given.get("optim.moments") in ("bf16", "int8") and rng.random() < 0.3:
        given["optim.embed_moments"] = "fp32"
