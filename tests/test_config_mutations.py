"""Command lines and files wrong by construction: a line per problem with key and value, no traceback."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.cli import parse
from configs.schema import Config, ConfigError, from_yaml, to_yaml
from optim.config import ProjectedConfig
from tests.lines import INVALID, KNOWN, OPTIONS, OUTSIDE, PROJECTED, UNBUILT, valid_lines, with_method

ROOT = Path(__file__).parents[1]
# Both end with 0, or with 2 and the problems on stderr; the first only checks.
CHECK, TRAIN = [sys.executable, "-m", "configs.cli"], [sys.executable, "train.py"]


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


NATURAL = {
    "optim.history": ["-1", "65", "99999999999999999999", "1.5", "null"],
    "optim.damping": ["0", "-1", "1e-4", "1e7", "nan", "inf", "null"],
}


def test_values_of_natural_galore_outside_their_ranges() -> None:
    for key, values in NATURAL.items():
        for value in values:
            (line,) = problems_of(["optim=natural_galore", f"{key}={value}"])
            assert line.startswith(f"{key}={value}: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("optim.refresh=together", "optim.adapt_refresh=false"),
        ("optim.energy=0", "(0, 1]"),
        ("optim.energy=1.1", "(0, 1]"),
        ("optim.rank=8 optim.rank_min=9", "rank_min=9: above optim.rank=8"),
        ("optim.adapt_rank=false optim.rank_step=2", "rank_step=2: would be ignored"),
        ("optim.adapt_rank=false optim.adapt_refresh=false optim.energy=0.5", "energy=0.5: would be ignored"),
    ],
)
def test_settings_of_adarankgrad_that_cannot_be_meant(given: str, said: str) -> None:
    (line,) = problems_of(["optim=adarankgrad", *given.split()])
    assert said in line
    parse(["optim=adarankgrad", "optim.adapt_rank=false", "optim.transport=keep"])
    parse(["optim=adarankgrad_8bit", "optim.adapt_refresh=false", "optim.refresh=together"])


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
                f"{key}=1: belongs to low-rank methods; choose optim=adarankgrad, adarankgrad_8bit, "
                "galore, galore_8bit, galore_sgd, gradnormlorp, gradnormlorp_8bit, gradnormlorp_adapter, "
                "gradnormlorp_adapter_8bit, natural_galore or natural_galore_8bit",
                f"{key}=1: belongs to projected methods; choose optim=adarankgrad, adarankgrad_8bit, "
                "galore, galore_8bit, galore_sgd, gradnormlorp, gradnormlorp_8bit, "
                "natural_galore or natural_galore_8bit",
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


@pytest.mark.parametrize("entry, wrong, right", [(CHECK, 5, 1), (TRAIN, 3, 1)], ids=["check", "train"])
def test_real_processes(entry: list[str], wrong: int, right: int) -> None:
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
