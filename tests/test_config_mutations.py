"""Command lines and files wrong by construction: a line per problem with key and value, no traceback."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.cli import parse
from configs.groups import GROUPS, group_options
from configs.schema import Config, ConfigError, from_yaml, to_yaml
from configs.values import leaves
from optim.config import ProjectedConfig

ROOT = Path(__file__).parents[1]
# Both end with 0, or with 2 and the problems on stderr; the first only checks.
CHECK, TRAIN = [sys.executable, "-m", "configs.cli"], [sys.executable, "train.py"]

KNOWN = [k for k in leaves(Config(optim=ProjectedConfig())) if k not in ("optim.name", "data.name")]
NATURAL = ["optim.history", "optim.damping"]
PROJECTED = [k for k in KNOWN if k not in leaves(Config())]
INTS = ["steps", "tokens_per_step", "micro_batch", "seq_len", "seed", "eval_every", "save_every", "keep_last"]
PROJECTED_INTS = ["optim.rank", "optim.refresh_every", "optim.history"]
FLOATS = [f"optim.{k}" for k in "lr scale beta1 beta2 eps decay clip warmup min_lr_ratio".split()]
FLOATS += ["activations.checkpoint", "save_minutes", "data.cache_gib"]
NOT_NULL = [k for k in INTS if k != "steps"] + [k for k in FLOATS if k != "optim.lr"]
NOT_NULL += [f"optim.{k}" for k in "moments clip_mode refresh finder side share transport".split()]
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
    "optim.history": ["-1", "65", "99999999999999999999"],
    "optim.damping": ["0", "-1", "1e-4", "1e7", "nan", "inf"],
    "activations.checkpoint": ["-0.5", "1.01", "nan", "inf", "8"],
    "data.cache_gib": ["0", "-20", "nan", "inf", "2000000"],
    "data.path": ["ftp://mirror/c4", "https://", "s3://bucket/c4"],
    "optim.schedule": ["cosin", "step", "warmup"],
    "weights": ["int8", "fp16", "float32"],
    "dist": ["fsdp", "ddp", "replicat"],
    "compile": ["on", "true", "max"],
    "log": ["mlflow", "[wandb,none]", "[wandb,wandb]", "[]", "7", "{wandb:1}"],
    "run.name": ["a/b", "..", ".", "../up", "/tmp/x", "a\\\\b"],
}
# Names of settings that do not exist yet, and of other programs.
UNBUILT = (
    "graph plan rewind trace activations.velora activations.layers "
    "optim.lift optim.rounding optim.mag_scale optim.weight_decay "
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


def invalid_ones() -> list[tuple[str, str, str]]:
    """(argument, key, value) of arguments that are each wrong on their own."""
    rng = random.Random(0)
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
    if "optim" in keys or not set(keys) & {*PROJECTED, *NATURAL}:
        return argv
    return [*argv, "optim=natural_galore" if set(keys) & set(NATURAL) else "optim=galore"]


def problems_of(argv: list[str]) -> list[str]:
    try:
        parse(with_method(argv))
    except ConfigError as error:
        assert error.problems and str(error) == "\n".join(error.problems)
        assert all(line.isprintable() for line in error.problems)
        return error.problems
    return []


def test_each_wrong_argument_gives_one_line_with_key_and_value() -> None:
    assert len(INVALID) >= 250
    for arg, key, value in INVALID:
        lines = problems_of([arg])
        assert len(lines) == 1, (arg, lines)
        assert key in lines[0] and value in lines[0], (arg, lines)
        assert ": " in lines[0] and ";" in lines[0], f"neither reason nor way out: {lines[0]}"


def test_keys_of_other_methods_give_one_line_with_those_that_have_them() -> None:
    for arg, key, value in INVALID:
        if key not in PROJECTED or not arg.startswith(f"{key}="):
            continue
        (line,) = problems_of(["optim=adamw", arg])
        assert line.startswith(f"{key}=") and value in line
    for key in PROJECTED:
        for method in ("adamw", "adamw_8bit"):
            (line,) = problems_of([f"optim={method}", f"{key}=1"])
            assert line in (
                f"{key}=1: belongs to low-rank methods; choose optim=galore, galore_8bit, galore_sgd, "
                "gradnormlorp, gradnormlorp_8bit, gradnormlorp_adapter, gradnormlorp_adapter_8bit, "
                "natural_galore or natural_galore_8bit",
                f"{key}=1: belongs to projected methods; choose optim=galore, galore_8bit, galore_sgd, "
                "gradnormlorp, gradnormlorp_8bit, natural_galore or natural_galore_8bit",
            )


def test_wrong_arguments_together_give_one_line_each() -> None:
    rng = random.Random(1)
    for _ in range(120):
        chosen = rng.sample(INVALID, rng.randrange(2, 6))
        keys = [key.lstrip("~") for _, key, _ in chosen]
        if len(set(keys)) < len(keys):
            continue
        lines = problems_of([arg for arg, _, _ in chosen])
        assert len(lines) == len(chosen), (chosen, lines)
        for arg, key, value in chosen:
            assert any(key in line and value in line for line in lines), (arg, lines)


def test_a_wrong_argument_is_found_among_right_ones() -> None:
    rng = random.Random(2)
    right = ["model=llama_tiny", "data=sample", "optim.eps=1e-6", "seed=3", "run.dir=elsewhere"]
    for arg, key, value in rng.sample(INVALID, 60):
        argv = [a for a in right if a.split("=")[0] != key.lstrip("~")]
        argv.insert(rng.randrange(len(argv) + 1), arg)
        lines = problems_of(argv)
        assert len(lines) == 1 and key in lines[0] and value in lines[0], (argv, lines)


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


def test_right_command_lines_pass() -> None:
    for argv in valid_lines():
        assert problems_of(argv) == [], argv


def test_noise_never_escapes_as_another_error() -> None:
    rng = random.Random(4)
    pieces = (
        *(
            "'",
            '"',
            "\\",
            "{",
            "}",
            "[",
            "]",
            "(",
            ")",
            ",",
            ":",
            "=",
            "+",
            "~",
            "@",
            "$",
            "${",
            "${oc.env:HOME}",
            "%",
            "\n",
        ),
        *(
            "\x00",
            "\x1b[31m",
            " ",
            "\t",
            "\u00e9",
            "\u4f60",
            "\U0001f600",
            "\udcff",
            "..",
            "/",
            "*",
            "null",
            "nan",
            "1e999",
        ),
        *(
            "-",
            "1_0",
            "0x10",
            "9" * 400,
            "true",
            "int(",
            "range(1,2)",
            "glob(*)",
            "a",
            "!!python/object:os.system",
            "#",
        ),
    )
    for _ in range(600):
        noise = "".join(rng.choices(pieces, k=rng.randrange(0, 6)))
        key = rng.choice([*KNOWN, *OPTIONS, ""])
        argv = [
            rng.choice([f"{key}={noise}", noise, f"{noise}{key}={noise}"]) for _ in range(rng.randrange(1, 3))
        ]
        problems_of(argv)
    for arg in [
        "steps=" + "9" * 5000,
        "optim.lr=" + "9" * 4000,
        "log=" + "[" * 500 + "]" * 500,
        "run.name=" + "x" * 10**5,
    ]:
        (line,) = problems_of([arg])
        assert len(line) < 700


def mutated_files() -> list[tuple[str, str, str]]:
    """(text of a config.yaml, key, value) with one bad value or unknown key each."""
    rng, text = random.Random(5), to_yaml(Config(optim=ProjectedConfig(name="galore")))
    cases = []
    for key, values in OUTSIDE.items():
        if key in NATURAL:
            continue
        value = rng.choice([v for v in values if "{" not in v])
        section, _, name = key.rpartition(".")
        lines = text.splitlines()
        start = lines.index(f"{section}:") if section else -1
        indent = "  " if section else ""
        row = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(f"{indent}{name}:"))
        cases.append(
            ("\n".join([*lines[:row], f"{indent}{name}: {value}", *lines[row + 1 :]]), key, value.strip("[]"))
        )
    for name in UNBUILT:
        if "." not in name:
            cases.append((f"{text}{name}: 31\n", name, "31"))
    return cases


def test_wrong_values_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, key, value in mutated_files():
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            from_yaml(path)
        (line,) = caught.value.problems
        assert line.startswith(f"{path}: "), line
        shown = value.replace("\\\\", "\\").split(",")[0].lower()
        assert key in line and (shown in line.lower() or f"{float(value):g}" in line), (key, value, line)


def run(entry: list[str], argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*entry, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("entry, wrong, right", [(CHECK, 23, 3), (TRAIN, 3, 1)], ids=["check", "train"])
def test_thirty_real_processes(entry: list[str], wrong: int, right: int) -> None:
    rng = random.Random(6 + wrong)
    bad, good = rng.sample(INVALID, wrong), rng.sample(valid_lines(), right)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda argv: run(entry, argv), [[arg] for arg, _, _ in bad]))
        for (arg, key, value), end in zip(bad, done, strict=True):
            assert end.returncode == 2 and end.stdout == "", (arg, end)
            (line,) = end.stderr.splitlines()
            assert key in line and value in line
        for end in pool.map(lambda argv: run(entry, ["--cfg", *argv]), good):
            assert end.returncode == 0 and end.stderr == "" and "tokens_per_step" in end.stdout, end
