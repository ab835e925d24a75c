"""Group files, precedence, defaults by size, the help text, and the configuration as YAML."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import answer, main, parse
from configs.help import FOLDER, GROUPS, group_options, help_text
from configs.schema import Config, ConfigError, from_yaml, to_yaml
from configs.values import get, leaves

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the group files that a test may change."""
    copy = tmp_path / "configs"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return copy


def problems_of(argv: list[str], folder: Path = FOLDER) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(argv, folder)
    return caught.value.problems


def test_defaults_are_the_documented_ones() -> None:
    cfg = parse([])
    assert (cfg.model.hidden_size, cfg.optim.name, cfg.data.name) == (512, "adamw", "c4")
    assert (cfg.seq_len, cfg.tokens_per_step, cfg.micro_batch) == (256, 131072, 16)
    assert (cfg.optim.scale, cfg.optim.beta1, cfg.optim.beta2, cfg.optim.eps) == (1.0, 0.9, 0.999, 1e-8)
    assert (cfg.optim.decay, cfg.optim.clip, cfg.optim.warmup, cfg.optim.min_lr_ratio) == (0.0, 0.0, 0.1, 0.1)
    assert cfg.run.name == "llama_60m_adamw_0" and cfg.run.dir == "runs"
    assert parse(["model=llama_tiny", "seed=7"]).run.name == "llama_tiny_adamw_7"
    assert parse(["run.name=mine"]).run.name == "mine"


def test_every_group_file_composes() -> None:
    files = ["data.train=a.txt", "data.validation=b.txt"]
    assert all(group_options(group) for group in GROUPS)
    for group in GROUPS:
        for option in group_options(group):
            needs = {"local": files, "tokens": files[:1]}.get(option, [])
            cfg = parse([f"{group}={option}", *needs])
            taken = (cfg.run.name or "").rsplit("_", 2)[0]
            assert group == "experiment" or option in (cfg.optim.name, cfg.data.name, taken)
    cfg = parse(["model=llama_9m", "data=c4", "experiment=quickstart"])
    assert (cfg.run.name, cfg.data.name) == ("llama_9m_adamw_0", "c4"), (
        "the command line's choice beats the recipe's"
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_group_files_hold_a_schema_and_recipes_leave_the_optimizer_alone(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    if path.parent.name == "experiment":
        assert path.read_text().startswith("# @package _global_\n")
        assert "optim" not in tree
    else:
        assert re.fullmatch(rf"/schema/{path.parent.name}/\w+@_here_", tree["defaults"][0])


def test_the_quickstart_divides_by_one_two_and_three_ranks() -> None:
    cfg = parse(["experiment=quickstart"])
    assert cfg.data.name == "sample" and cfg.run.name == "llama_tiny_adamw_0"
    for world in (1, 2, 3):
        k = cfg.accumulation(world)
        assert k * world * cfg.micro_batch * cfg.seq_len == cfg.tokens_per_step


def test_precedence_dataclass_group_recipe_command_line(folder: Path) -> None:
    (folder / "model" / "mine.yaml").write_text(
        "defaults: [/schema/model/llama@_here_]\nhidden_size: 64\nintermediate_size: 96\nvocab_size: 512\n"
    )
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mine\n"
        "steps: 3\nmodel:\n  intermediate_size: 160\n  vocab_size: 1024\n"
    )
    cfg = parse(["experiment=mine", "model.vocab_size=2048"], folder)
    assert cfg.model.num_hidden_layers == Config().model.num_hidden_layers
    assert (cfg.model.hidden_size, cfg.model.intermediate_size, cfg.model.vocab_size) == (64, 160, 2048)
    assert cfg.steps == 3 and cfg.run.name == "mine_adamw_0"
    assert parse(["steps=4", "experiment=mine"], folder).steps == 4, "whatever the order on the command line"
    cfg = parse(["experiment=mine", "model=llama_tiny"], folder)
    assert cfg.model.hidden_size == 128 and cfg.run.name == "llama_tiny_adamw_0"
    with (folder / "config.yaml").open("a") as file:
        file.write("seed: 9\nkeep_last: 5\n")
    (folder / "experiment" / "late.yaml").write_text("# @package _global_\nseed: 11\n")
    cfg = parse(["experiment=late", "optim.eps=1e-9"], folder)
    assert (cfg.seed, cfg.keep_last) == (11, 5), "a recipe beats config.yaml"
    assert parse(["experiment=null"], folder) == parse([], folder)


def test_bad_group_files_give_one_line_per_problem(folder: Path) -> None:
    def recipe(name: str, text: str) -> tuple[str, list[str]]:
        path = folder / "experiment" / f"{name}.yaml"
        path.write_text(f"# @package _global_\n{text}\n")
        return str(path), problems_of([f"experiment={name}"], folder)

    path, lines = recipe("a", "stepz: 5\nseed: abc\noptim:\n  rank: 7\nmicro_batch: 8")
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)
    for line, words in zip(lines, (["stepz=5", "steps"], ["seed=abc"], ["optim.rank=7"]), strict=True):
        assert all(word in line for word in words)
    assert recipe("b", "seed: -4")[1][0].startswith("seed=-4: ")
    path, lines = recipe("c", "seed: [")
    assert len(lines) == 1 and path in lines[0]
    (line,) = recipe("d", "defaults:\n  - override /model: llama_9t")[1]
    assert "llama_9t" in line and "\n" not in line
    (folder / "model" / "bad.yaml").write_text("defaults: [/schema/model/llama@_here_]\nheads: 3\n")
    (line,) = problems_of(["model=bad"], folder)
    assert "model.heads=3" in line
    lines = problems_of(["model=bad", "stepz=4"], folder)
    assert len(lines) == 2 and lines[0].startswith("stepz=4: ")


def test_unknown_options_name_the_nearest_and_all() -> None:
    (line,) = problems_of(["data=sampel"])
    assert line.startswith("data=sampel: ") and "did you mean sample?" in line
    assert all(option in line for option in group_options("data"))
    (line,) = problems_of(["lr=1e-3"])
    assert "did you mean optim.lr?" in line
    (line,) = problems_of(["optim.betta1=0.9"])
    assert "did you mean optim.beta1?" in line
    (line,) = problems_of(["log=wandb,tensorboard"])
    assert "[a,b]" in line


def test_a_key_given_twice_is_refused_with_both_values() -> None:
    (line,) = problems_of(["steps=5", "steps=7"])
    assert "steps=5" in line and "steps=7" in line
    (line,) = problems_of(["model=llama_60m", "model=llama_tiny"])
    assert "llama_60m" in line and "llama_tiny" in line


def test_tokens_per_step_names_the_nearest_that_divide() -> None:
    (line,) = problems_of(["micro_batch=24"])
    assert line.startswith("tokens_per_step=131072: ") and "micro_batch=24" in line and "seq_len=256" in line
    assert "129024 or 135168" in line
    (line,) = problems_of(["tokens_per_step=100"])
    assert "tokens_per_step=100" in line and line.endswith("nearest: 4096")


def test_a_source_that_lacks_its_files_is_found_beside_other_problems() -> None:
    first, second = problems_of(["data=tokens", "stepz=3"])
    assert first.startswith("stepz=3: ") and second.startswith("data.train=null: ")


def test_nothing_is_judged_by_the_default_of_a_value_that_failed() -> None:
    (line,) = problems_of(["data=nonsense", "data.train=x"])  # would be ignored, had c4 been meant
    assert line.startswith("data=nonsense: ")
    (line,) = problems_of(["model=nonsense", "model.hidden_size=100"])  # 8 heads do not divide it
    assert line.startswith("model=nonsense: ")
    (line,) = problems_of(["micro_batch=many", "tokens_per_step=2048"])
    assert line.startswith("micro_batch=many: ")
    first, second = problems_of(["optim=nonsense", "optim.beta1=2"])
    assert first.startswith("optim=nonsense: ") and second.startswith("optim.beta1=2: ")


def test_hydra_settings_point_to_the_run_folder() -> None:
    (line,) = problems_of(["hydra.run.dir=x"])
    assert "run.name" in line


def test_values_keep_what_was_typed() -> None:
    (line,) = problems_of(["optim.lr=1e6"])
    assert line.startswith("optim.lr=1e6: ")
    assert parse(["run.name=007"]).run.name == "007"
    assert parse(["run.name=1e3"]).run.name == "1e3"
    assert parse(["data=local", "data.validation=v", "data.train=[a.txt,b/*.json]"]).data.train == [
        "a.txt",
        "b/*.json",
    ]
    assert parse(['run.name="a b"']).run.name == "a b"
    assert parse(["optim.lr=1"]).optim.lr == 1.0 and isinstance(parse(["optim.lr=1"]).optim.lr, float)


def test_an_ignored_setting_is_an_error() -> None:
    (line,) = problems_of(["optim.schedule=constant", "optim.min_lr_ratio=0.5"])
    assert "optim.min_lr_ratio=0.5" in line and "optim.schedule=constant" in line
    parse(["optim.schedule=constant"])


def shaped(hidden: int, intermediate: int, layers: int, heads: int) -> Config:
    cfg = Config()
    cfg.model.hidden_size, cfg.model.intermediate_size = hidden, intermediate
    cfg.model.num_hidden_layers, cfg.model.num_attention_heads = layers, heads
    return cfg


@pytest.mark.parametrize(
    "shape, steps, lr",
    [
        ((512, 1376, 8, 8), 10_000, 1e-3),  # 60M
        ((768, 2048, 12, 12), 20_000, 1e-3),  # 130M
        ((1024, 2736, 24, 16), 60_000, 1e-3),  # 350M
        ((2048, 5461, 24, 32), 100_000, 5e-4),  # 1B
        ((4096, 11008, 32, 32), 150_000, 5e-4),  # 7B
    ],
)
def test_nulls_resolve_by_model_size(shape: tuple[int, int, int, int], steps: int, lr: float) -> None:
    cfg = shaped(*shape)
    done = cfg.resolved()
    assert (done.steps, done.optim.lr) == (steps, lr)
    assert cfg.steps is None and cfg.optim.lr is None, "the original stays"
    cfg.steps, cfg.optim.lr, cfg.run.name = 3, 0.02, "x"
    done = cfg.resolved()
    assert (done.steps, done.optim.lr, done.run.name) == (3, 0.02, "x")


def test_accumulation_for_ranks() -> None:
    cfg = Config()
    assert (cfg.accumulation(1), cfg.accumulation(4)) == (32, 8)
    with pytest.raises(ConfigError, match="tokens_per_step=131072.*3 ranks.*122880 or 135168"):
        cfg.accumulation(3)


def test_check_needs_no_command_line() -> None:
    cfg = Config(steps=0, seed=-1)
    cfg.optim.lr = float("nan")
    lines = cfg.check()
    assert [line.split("=")[0] for line in lines] == ["steps", "seed", "optim.lr"]
    assert Config().check() == []


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=8)
ODD = st.sampled_from(
    ["null", "~", "1e3", "1_000", "off", "yes", "0x1f", "12:30", "2020-01-01", "=", "<<", "- a", "#"]
)


@settings(max_examples=60, deadline=None, database=None)
@given(
    name=(TEXT | ODD).filter(lambda s: "${" not in s and s != "???"),
    lr=st.none() | st.floats(1e-300, 10.0),
    train=st.none() | st.lists(ODD, max_size=3) | ODD,
)
def test_yaml_round_trip_is_exact(tmp_path_factory, name, lr, train) -> None:
    cfg = Config()
    cfg.data.cache, cfg.optim.lr, cfg.data.train = name, lr, train
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8")
    values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    assert list(values) == list(asdict(cfg))
    try:
        assert from_yaml(path) == cfg
    except ConfigError as error:  # a value that the data's own check refuses
        assert all("data." in line for line in error.problems)


def test_yaml_round_trip_of_composed_configurations(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for argv in (
        [],
        ["experiment=quickstart", "log=[wandb,tensorboard]"],
        ["optim.eps=1e-12", "weights=fp32"],
    ):
        cfg = parse(argv).resolved()
        path.write_text(to_yaml(cfg))
        assert from_yaml(path) == cfg
    path.write_text("model:\n  init_from: a/folder/since/removed\n")
    assert from_yaml(path).model.init_from == "a/folder/since/removed"
    path.write_text("seed: 5\n")
    assert from_yaml(path).seed == 5 and from_yaml(path).micro_batch == 16


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "a: [", "steps: 1\nsteps: 2", "x", "\x00", "optim: 3", "a: ${", "1: 2"]
)
def test_a_file_that_is_no_configuration_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        from_yaml(path)


def test_help_fits_and_names_everything() -> None:
    text = help_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 70 and text.isascii()
    words = set(re.split(r"[\s,:;]+", text))
    for group in GROUPS:
        assert {group, *group_options(group)} <= words
    cfg = Config()
    for key in leaves(cfg):
        if key in ("optim.name", "data.name"):
            continue
        value = get(cfg, key)
        shown = {None: "null", False: "false"}.get(value, value) if value is None or value is False else value
        assert f"{key}={shown}" in words, key
    for code in ("0 done", "2 bad", "3 training", "4 out of memory"):
        assert code in text


def test_answers_instead_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["model=nonsense", "--help"]) == answer(["-h"]) == help_text()
    assert answer(["steps=3"]) is None
    shown = answer(["--cfg", "job", "steps=3", "experiment=quickstart"])
    assert (
        shown
        == answer(["steps=3", "experiment=quickstart", "--cfg"])
        == answer(["steps=3", "--cfg=job", "experiment=quickstart"])
    )
    tree = yaml.safe_load(shown or "")
    assert tree["steps"] == 3 and tree["data"]["name"] == "sample" and tree["optim"]["lr"] == 1e-3
    with pytest.raises(ConfigError, match="stepz"):
        answer(["--cfg", "stepz=3"])
    (tmp_path / "config.json").write_text("{}")
    assert yaml.safe_load(answer(["--cfg", f"model.init_from={tmp_path}"]) or "")["optim"]["lr"] is None
    assert main(["seed=1"]) == 0 and capsys.readouterr().out == "ok\n"
    assert main(["seed=x"]) == 2 and capsys.readouterr().err.startswith("seed=x: ")


def test_parsing_leaves_hydra_and_the_defaults_alone() -> None:
    before = GlobalHydra.instance().is_initialized()
    for _ in range(300):
        parse(["experiment=quickstart", "steps=3"])
    assert GlobalHydra.instance().is_initialized() == before
    first, second = parse([]), parse([])
    first.optim.lr = 3.0
    assert second.optim.lr is None and parse([]).optim.lr is None, "two calls share nothing"


def test_the_makefile_reads_the_quickstart_run() -> None:
    cfg = parse(["experiment=quickstart"])
    assert f"RUN := {cfg.run.dir}/{cfg.run.name}\n" in (ROOT / "Makefile").read_text()
