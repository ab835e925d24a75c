"""Command lines wrong and right by construction, for tests of the parser and of whole runs."""

import random

from configs.groups import GROUPS, group_options
from configs.schema import Config
from configs.values import leaves
from optim.config import ProjectedConfig

KNOWN = [k for k in leaves(Config(optim=ProjectedConfig())) if k not in ("optim.name", "data.name")]
PROJECTED = [k for k in KNOWN if k not in leaves(Config())]
INTS = ["steps", "tokens_per_step", "micro_batch", "seq_len", "seed", "eval_every", "save_every", "keep_last"]
PROJECTED_INTS = ["optim.rank", "optim.refresh_every"]
FLOATS = [f"optim.{k}" for k in "lr scale beta1 beta2 eps decay clip warmup min_lr_ratio".split()]
FLOATS += ["activations.checkpoint", "save_minutes", "data.cache_gib"]
NOT_NULL = [k for k in INTS if k != "steps"] + [k for k in FLOATS if k != "optim.lr"]
NOT_NULL += [f"optim.{k}" for k in "moments rounding clip_mode refresh finder side share transport".split()]
OPTIONS = {group: group_options(group) for group in GROUPS}
# What a source needs beside its name.
NEEDS = {"local": ["data.train=a.txt", "data.validation=b.txt"], "tokens": ["data.train=folder"]}
# Each is below or above what its key allows.
OUTSIDE = {
    "steps": ["0", "-5", "1000000001"],
    "tokens_per_step": ["0", "-131072", "1073741825", "99999999999999999999"],
    "micro_batch": ["0", "-1", "65537"],
    "seq_len": ["1", "0", "131073"],
    "seed": ["-1", "2147483648"],
    "eval_every": ["0", "-3"],
    "save_every": ["0", "-7"],
    "save_minutes": ["-1", "nan", "inf", "1e7"],
    "spike": ["on", "ignore", "Skip"],
    "keep_last": ["0", "-2"],
    "optim.lr": ["0", "-1e-3", "10.5", "nan", "inf"],
    "optim.scale": ["0", "-0.25", "100.5", "inf", "nan"],
    "optim.beta1": ["1", "-0.1", "1.5", "nan"],
    "optim.beta2": ["1.0", "-0.5", "2"],
    "optim.eps": ["0", "-1e-8", "nan", "inf"],
    "optim.decay": ["-0.1", "1.1", "inf"],
    "optim.clip": ["-1", "nan", "-inf"],
    "optim.warmup": ["-0.1", "1.5", "nan"],
    "optim.min_lr_ratio": ["-0.01", "1.01", "nan"],
    "optim.moments": ["int4", "fp16", "FP32", "8bit"],
    "optim.embed_moments": ["bf16", "int8", "none"],
    "optim.rounding": ["stochastik", "up", "none"],
    "optim.clip_mode": ["exakt", "global", "lagged"],
    "optim.update": ["before", "in_step", "inbackward"],
    "optim.growth_limit": ["-1", "0.5", "nan", "1001"],
    "optim.rank": ["0", "-4", "65537", "99999999999999999999"],
    "optim.refresh_every": ["0", "-1", "1000001"],
    "optim.refresh": ["lazy", "stagered", "never"],
    "optim.finder": ["exact", "gram", "qr"],
    "optim.side": ["left", "right", "short", "std"],
    "optim.transport": ["rotate+fill", "none", "ldadam"],
    "optim.basis_dtype": ["int8", "float32", "int4"],
    "activations.checkpoint": ["-0.5", "1.01", "nan", "inf", "8"],
    "activations.recompute": ["up", "all", "true"],
    "activations.layers": ["w", "[v,v]", "[]", "7", "{v:8}"],
    "activations.group": ["8", "v", "[8]"],  # without layers
    "activations.init": ["running", "svd"],  # likewise
    "data.cache_gib": ["0", "-20", "nan", "inf", "2000000"],
    "data.path": ["ftp://mirror/c4", "https://", "s3://bucket/c4"],
    "optim.schedule": ["cosin", "step", "warmup"],
    "weights": ["int8", "fp16", "float32"],
    "dist": ["fsdp", "ddp", "replicat"],
    "compile": ["on", "true", "max"],
    "graph": ["on", "true", "full"],
    "log": ["mlflow", "[wandb,none]", "[wandb,wandb]", "[]", "7", "{wandb:1}"],
    "run.name": ["a/b", "..", ".", "../up", "/tmp/x", "a\\\\b"],
}
# Names of settings that do not exist yet, and of other programs.
UNBUILT = (
    "graphs plan rewind trace activations.velora "
    "optim.lifts optim.mag_scale optim.weight_decay "
    "model.hidden batch_size max_steps data.shuffle run.id"
).split()


def broken_names(rng: random.Random, name: str) -> str:
    """A name near `name` that no key and no option has."""
    while True:
        i = rng.randrange(len(name))
        new = rng.choice(
            [name[:i] + name[i + 1 :], name[:i] + name[i] * 2 + name[i + 1 :], name[:i] + "q" + name[i:]]
        )
        taken = [*KNOWN, "optim.name", "data.name", *OPTIONS, *sum(OPTIONS.values(), [])]
        sections = {k.rsplit(".", 1)[0] for k in KNOWN if "." in k}
        if new and new not in taken and new not in sections and new[0].isalpha() and not new.endswith("."):
            return new


def invalid_ones(seed: int = 0) -> list[tuple[str, str, str]]:
    """(argument, key, value) of arguments that are each wrong on their own."""
    rng = random.Random(seed)
    cases = [(f"{key}={v}", key, v) for key, values in OUTSIDE.items() for v in values]
    for key in KNOWN:
        name, value = broken_names(rng, key), str(rng.randrange(1, 10**6))
        prefix = rng.choice(["", "", "+", "++"])
        cases.append((f"{prefix}{name}={value}", name, value))
    for name in UNBUILT:
        value = rng.choice(["true", "4", "auto", "0.5"])
        cases.append((f"{rng.choice(['', '+', '++'])}{name}={value}", name, value))
    for key in INTS + PROJECTED_INTS:
        value = rng.choice(["abc", "1.5", "true", "[1,2]", "{a:1}", "1e3", "'12'", "ten"])
        cases.append((f"{key}={value}", key, value))
    for key in FLOATS:
        value = rng.choice(["abc", "true", "[0.1]", "{a:1}", "'0.1'", "1e-3x"])
        cases.append((f"{key}={value}", key, value))
    cases += [(f"optim.share={v}", "optim.share", v) for v in ("1", "yes_", "'true'", "q", "0.5")]
    for key in ("deterministic", "profile", "optim.lr_range"):
        cases += [(f"{key}={v}", key, v) for v in ("1", "on", "null", "'false'")]
    cases += [(f"{key}=null", key, "null") for key in NOT_NULL]
    cases += [(f"{key}=", key, "") for key in rng.sample(KNOWN, 8)]
    cases += [(f"{key}=''", key, "''") for key in ("run.name", "run.dir", "data.cache")]
    cases += [(f"{key}=1,2", key, "1,2") for key in rng.sample(INTS + FLOATS, 6)]
    cases += [
        (f"{key}={v}", key, v)
        for key, v in [("steps", "range(1,5)"), ("seed", "choice(1,2)"), ("log", "a,b")]
    ]
    cases += [(f"{key}=${{seed}}", key, "${seed}") for key in rng.sample(KNOWN, 6)]
    cases += [(f"{key}=???", key, "???") for key in ("run.name", "steps", "data.train")]
    cases += [(f"{key}=[${{seed}}]", key, "[${seed}]") for key in ("data.train", "log")]
    cases += [(f"~{key}", f"~{key}", key) for key in rng.sample(KNOWN, 4)]
    cases += [(f"+{key}=3", key, "3") for key in rng.sample(INTS, 4)]
    cases += [(key, key, key) for key in rng.sample(KNOWN, 5)]
    cases += [(f"{key}=a[b", key, "a[b") for key in rng.sample(KNOWN, 4)]
    cases += [(f"{key}={{a:", key, "{a:") for key in rng.sample(KNOWN, 2)]
    cases += [
        (f"hydra.{k}={v}", f"hydra.{k}", v)
        for k, v in [("run.dir", "x"), ("verbose", "true"), ("mode", "MULTIRUN")]
    ]
    cases += [
        ("hydra/launcher=joblib", "hydra/launcher", "joblib"),
        ("+hydra.job.name=x", "hydra.job.name", "x"),
    ]
    cases += [
        (flag, flag, flag)
        for flag in ("-m", "--multirun", "--steps", "-", "--config-dir=x", "--lr=1", "-cfg")
    ]
    cases += [("optim.name=galore", "optim.name", "galore"), ("data.name=c4", "data.name", "c4")]
    cases += [
        ("run=x", "run", "x"),
        ("schema/model=llama", "schema/model", "llama"),
        ("model@m=llama_60m", "model@m", "60m"),
    ]
    for group, options in OPTIONS.items():
        for option in [broken_names(rng, rng.choice(options)), "nothing_like_it", "[a]", "../config", "3"]:
            cases.append((f"{group}={option}", group, option))
    cases += [(f"{g}=null", g, "null") for g in ("model", "optim", "data", "activations")]
    return cases


INVALID = invalid_ones()


def with_method(argv: list[str]) -> list[str]:
    """The same with a method that has all the keys, if some are a projected method's and none is chosen."""
    keys = [arg.partition("=")[0].lstrip("+") for arg in argv]
    return argv if "optim" in keys or not set(keys) & set(PROJECTED) else [*argv, "optim=galore"]


def valid_lines() -> list[list[str]]:
    rng = random.Random(3)
    lines = []
    for _ in range(80):
        micro, seq = rng.choice([1, 2, 3, 8]), rng.choice([2, 33, 128, 1024])
        tokens = micro * seq * rng.randrange(1, 9)
        argv = [f"micro_batch={micro}", f"seq_len={seq}", f"tokens_per_step={tokens}"]
        argv += rng.sample(
            [
                *(f"{group}={rng.choice(options)}" for group, options in OPTIONS.items()),
                f"steps={rng.choice(['null', '1', '100', '1000000000'])}",
                f"seed={rng.choice([0, 7, 2**31 - 1])}",
                f"optim.lr={rng.choice(['null', '1e-3', '3', '0.5', '.01'])}",
                f"optim.beta1={rng.choice(['0', '0.9', '0.999'])}",
                f"optim.warmup={rng.choice(['0', '1', '0.05'])}",
                f"optim.min_lr_ratio={rng.choice(['0', '1', '0.1'])}",
                f"optim.clip={rng.choice(['0', '1.0', '1e3'])}",
                f"optim.update={rng.choice(['null', 'after'])}",
                f"optim.moments={rng.choice(['fp32', 'bf16', 'int8'])}",
                "optim.embed_moments=null",
                f"activations.checkpoint={rng.choice(['0', '0.5', '1'])}",
                f"weights={rng.choice(['null', 'bf16', 'fp32'])}",
                f"compile={rng.choice(['auto', 'off'])}",
                f"log={rng.choice(['none', 'wandb', '[wandb]', '[wandb,tensorboard]'])}",
                f"run.name={rng.choice(['a', '007', '1e3', 'null', 'true', 'with space', 'x.y-z_1'])}",
                "++keep_last=5",
            ],
            rng.randrange(0, 12),
        )
        if any(arg.startswith("optim=galore") for arg in argv):
            argv += rng.sample(
                [
                    f"optim.rank={rng.choice(['null', '1', '65536'])}",
                    f"optim.refresh_every={rng.choice(['null', '1', '1000000'])}",
                    *(
                        f"optim.{k}={rng.choice(ProjectedConfig.CHOICES[k])}"
                        for k in "refresh finder side transport basis_dtype".split()
                    ),
                    f"optim.share={rng.choice(['true', 'false'])}",
                ],
                rng.randrange(0, 6),
            )
        for need in NEEDS.get("".join(a for a in argv if a.startswith("data="))[5:], []):
            argv.append(need)
        lines.append(argv)
    return lines
