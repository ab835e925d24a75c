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
from configs.groups import FOLDER, GROUPS, group_options
from configs.help import help_text
from configs.resume import MAY_CHANGE, differences
from configs.schema import Config, ConfigError, from_yaml, methods, to_yaml
from configs.values import get, leaves, put
from llama.config import num_block_params, num_params
from optim.config import (
    AdapterConfig,
    AdaRankConfig,
    BasisConfig,
    NaturalConfig,
    OptimConfig,
    ProjectedConfig,
    default_lr,
    default_rank,
    default_refresh_every,
    either,
    inside,
)
from tests.mutants import kills

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
            assert group in ("experiment", "activations") or option in (cfg.optim.name, cfg.data.name, taken)
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


def test_methods_are_the_group_files() -> None:
    ada = ["adarankgrad", "adarankgrad_8bit"]
    low = [*ada, "galore", "galore_8bit", "galore_sgd"]
    magnitudes = ["gradnormlorp", "gradnormlorp_8bit"]
    adapters = ["gradnormlorp_adapter", "gradnormlorp_adapter_8bit"]
    naturals = ["natural_galore", "natural_galore_8bit"]
    assert methods("adamw") == ["adamw", "adamw_8bit", *low, *magnitudes, *adapters, *naturals]
    assert methods("low-rank") == [*low, *magnitudes, *adapters, *naturals]
    assert methods("projected") == [*low, *magnitudes, *naturals] and methods("magnitude") == magnitudes
    assert methods("adapter") == adapters and methods("natural") == naturals and methods("adarank") == ada
    for name in group_options("optim"):
        cfg = parse([f"optim={name}"])
        assert cfg.optim.name == name and cfg.optim.moments == ("int8" if "8bit" in name else "fp32")
        assert isinstance(cfg.optim, BasisConfig) == (name not in ("adamw", "adamw_8bit"))
        assert cfg.run.name == f"llama_60m_{name}_0" and cfg.optim.rounding == "stochastic"
        assert cfg.check() == []
    every = [
        parse(["optim=gradnormlorp", *more]).resolved().optim for more in ([], ["optim.refresh_every=null"])
    ]
    assert [cfg.refresh_every for cfg in every] == [250, 200]
    scales = [parse([f"optim={name}"]).optim.scale for name in ("adamw", "galore", "galore_sgd")]
    assert scales == [1.0, 0.25, 50.0]


def test_keys_of_projected_methods() -> None:
    galore = parse(["optim=galore", "optim.rank=64", "optim.share=false", "optim.finder=svd"]).optim
    assert (galore.rank, galore.share, galore.finder) == (64, False, "svd")
    for argv in (["optim.rank=64"], ["optim=adamw_8bit", "optim.rank=64"], ["++optim.rank=64"]):
        (line,) = problems_of(argv)
        assert (
            line == "optim.rank=64: belongs to low-rank methods; choose optim=adarankgrad, adarankgrad_8bit, "
            "galore, galore_8bit, galore_sgd, gradnormlorp, gradnormlorp_8bit, gradnormlorp_adapter, "
            "gradnormlorp_adapter_8bit, natural_galore or natural_galore_8bit"
        )
    (line,) = problems_of(["optim=galore", "optim.history=2"])
    assert line.endswith("natural methods; choose optim=natural_galore or natural_galore_8bit")
    (line,) = problems_of(["optim=natural_galore", "optim.history=0", "optim.damping=2"])
    assert line.startswith("optim.damping=2: would be ignored with optim.history=0; ")
    natural = parse(["optim=natural_galore_8bit", "optim.history=0"]).optim
    assert (natural.history, natural.damping, natural.moments) == (0, 10.0, "int8")
    (line,) = problems_of(["optim=galore", "optim.merge_every=9"])
    assert line.endswith("adapter methods; choose optim=gradnormlorp_adapter or gradnormlorp_adapter_8bit")
    (line,) = problems_of(["optim=gradnormlorp_adapter", "optim.side=output"])
    assert "projected methods; choose optim=adarankgrad, " in line and "adapter" not in line
    (line,) = problems_of(["optim=galore", "optim.mag_scale=1"])
    assert "magnitude methods; choose optim=gradnormlorp, " in line and "gradnormlorp_adapter" in line
    first, second, third = problems_of(["optim.rank=64", "stepz=3", "optim.beta1=2"])
    assert first.startswith("stepz=3: ") and second.startswith("optim.rank=64: belongs")
    assert third.startswith("optim.beta1=2: ")
    (line,) = problems_of(["rank=64"])
    assert "did you mean optim.rank?" in line
    (line,) = problems_of(["optim=galore", "optim.rnk=4"])
    assert "did you mean optim.rank?" in line


def test_a_recipe_may_choose_a_projected_method(folder: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /optim: galore\noptim:\n  rank: {}\n"
    path = folder / "experiment" / "mine.yaml"
    path.write_text(text.format(7))
    cfg = parse(["experiment=mine", "optim.side=both"], folder)
    assert isinstance(cfg.optim, ProjectedConfig) and (cfg.optim.rank, cfg.optim.side) == (7, "both")
    (line,) = problems_of(["experiment=mine", "optim=adamw"], folder)
    assert line.startswith(f"{path}: optim.rank=7: belongs to low-rank methods; choose optim=adarankgrad, ")
    path = folder / "experiment" / "wrong.yaml"
    path.write_text(text.format("many"))
    (line,) = problems_of(["experiment=wrong"], folder)
    assert line.startswith(f"{path}: optim.rank=many: not an integer")


def test_a_method_that_was_mistyped_is_given_the_benefit_of_the_doubt() -> None:
    for argv in (
        ["optim.rank=64"],
        ["optim.clip=1", "optim.clip_mode=per_layer"],
        ["optim.clip=1", "optim.clip_mode=two_pass"],
        ["optim.clip=1", "optim.update=in_backward"],
    ):
        (line,) = problems_of(["optim=galor", *argv])
        assert line.startswith("optim=galor: ") and "did you mean galore?" in line
    first, second = problems_of(["optim=galor", "optim.rank=0"])
    assert first.startswith("optim=galor: ") and second.startswith("optim.rank=0: outside [1, 65536]; ")
    first, second = problems_of(["optim=galor", "optim.clip_mode=exakt"])
    assert second == "optim.clip_mode=exakt: no such choice; choose exact, two_pass or off"
    first, second = problems_of(["optim=galor", "optim.clip=1", "optim.clip_mode=off"])
    assert second.startswith("optim.clip=1: would be ignored with optim.clip_mode=off; ")
    (line,) = problems_of(["model=nonsense", "activations.checkpoint=0.01"])
    (line,) = problems_of(["model=nonsense", "model.num_attention_heads=7"])


CLASHES = [
    (
        ["optim.clip=1", "optim.clip_mode=off"],
        "optim.clip=1: ",
        "set optim.clip=0 or choose exact or two_pass",
    ),
    (
        ["optim=galore", "optim.clip=1", "optim.clip_mode=off"],
        "optim.clip=1: ",
        "set optim.clip=0 or choose global_estimated, projected or per_layer",
    ),
    (
        ["optim.clip=1", "optim.update=in_backward"],
        "optim.update=in_backward: optim.clip=1.0 with optim.clip_mode=exact needs all gradients ",
        "set optim.update=after or optim.clip_mode=two_pass",
    ),
    (
        ["optim.clip=1", "optim.clip_mode=two_pass", "optim.update=after"],
        "optim.update=after: ",
        "choose exact",
    ),
    (
        ["optim.clip_mode=two_pass"],
        "optim.clip_mode=two_pass: would run every backward twice for nothing ",
        "",
    ),
    (["optim=galore", "optim.clip_mode=per_layer"], "optim.clip_mode=per_layer: would be ignored ", ""),
    (["optim.embed_moments=fp32"], "optim.embed_moments=fp32: would change nothing ", "bf16 or int8 there"),
    (["optim=galore", "optim.embed_moments=int8"], "optim.embed_moments=int8: ", "choose fp32 or null"),
    (["optim.rounding=up"], "optim.rounding=up: no such choice; ", "choose stochastic or nearest"),
    (["optim.clip_mode=projected"], "optim.clip_mode=projected: ", "choose exact, two_pass or off"),
    (["optim=galore", "optim.clip_mode=exact"], "optim.clip_mode=exact: ", "projected, per_layer or off"),
    (["optim=galore", "optim.basis_dtype=int8"], "optim.basis_dtype=int8: ", "choose bf16, fp32 or null"),
    (["activations.checkpoint=0.05"], "activations.checkpoint=0.05: ", "give 0.125 or more, or 0"),
    (["activations.checkpoint=1.1"], "activations.checkpoint=1.1: outside [0, 1]; ", ""),
]


@pytest.mark.parametrize(
    ("argv", "start", "end"), CLASHES, ids=lambda v: v[-1] if isinstance(v, list) else ""
)
def test_settings_that_do_not_go_together(argv: list[str], start: str, end: str) -> None:
    (line,) = problems_of(argv)
    assert line.startswith(start) and line.endswith(end) and "; " in line


@pytest.mark.parametrize(
    "argv",
    [
        ["optim.clip=1"],
        ["optim.update=in_backward"],
        ["optim.clip_mode=off"],
        ["optim.clip=1", "optim.clip_mode=two_pass", "optim.update=in_backward"],
        ["optim=adamw_8bit", "optim.embed_moments=fp32"],
        ["optim=gradnormlorp_adapter", "optim.merge_every=0", "optim.rounding=nearest"],
        ["optim=galore", "optim.moments=bf16", "optim.embed_moments=fp32"],
        ["optim=galore", "optim.clip=1", "optim.clip_mode=projected", "optim.update=after"],
        ["optim=galore", "optim.side=output", "optim.basis_dtype=fp32", "optim.rank=65536"],
        [
            "optim=galore",
            "optim.refresh=together",
            "optim.refresh_every=1000000",
            "optim.transport=rotate_fill",
        ],
        ["activations=plain", "activations.checkpoint=0.07"],
        ["activations.checkpoint=1"],
    ],
    ids=lambda argv: argv[-1],
)
def test_settings_that_go_together(argv: list[str]) -> None:
    parse(argv)


def test_when_weights_change() -> None:
    dense = [("exact", None), ("two_pass", None), ("off", None), ("off", "after"), ("exact", "in_backward")]
    done = [OptimConfig(clip_mode=mode, update=update).update_resolved for mode, update in dense]
    assert done == ["after", "in_backward", "in_backward", "after", "in_backward"]
    assert ProjectedConfig().update_resolved == "in_backward"
    assert ProjectedConfig(update="after").update_resolved == "after"


def test_intervals_and_lists() -> None:
    assert [inside(v, "(0, 10]") for v in (0, 1e-9, 10, 10.1)] == [False, True, True, False]
    assert [inside(v, "[0, 1)") for v in (-1, 0, 0.9, 1, float("nan"))] == [False, True, True, False, False]
    assert [either(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a or b", "a, b or c"]


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


@pytest.mark.parametrize(
    ("size", "rank", "lr", "every"),
    [
        ("tiny", 32, 0.01, 200),
        ("9m", 32, 0.01, 200),
        ("60m", 128, 0.01, 200),
        ("71m", 128, 0.01, 200),
        ("100m", 192, 0.01, 200),  # 160, rounded up to a multiple of 64
        ("130m", 256, 0.01, 200),
        ("250m", 192, 0.01, 200),
        ("350m", 256, 0.01, 200),
        ("1b", 512, 0.01, 200),
        ("3b", 640, 0.01, 200),
        ("7b", 1024, 0.005, 500),
    ],
)
def test_nulls_of_projected_methods_resolve_by_model_size(
    size: str, rank: int, lr: float, every: int
) -> None:
    argv = [f"model=llama_{size}", "optim=galore"]
    cfg = parse(argv)
    done = cfg.resolved().optim
    assert isinstance(done, ProjectedConfig) and (done.rank, done.lr, done.refresh_every) == (rank, lr, every)
    numbers = num_params(cfg.model)
    assert default_rank(num_block_params(cfg.model), cfg.model.hidden_size) == rank
    assert (default_lr(numbers, projected=True), default_refresh_every(numbers)) == (lr, every)
    done = parse([*argv, "optim.rank=3", "optim.lr=1", "optim.refresh_every=5"]).resolved().optim
    assert isinstance(done, ProjectedConfig) and (done.rank, done.lr, done.refresh_every) == (3, 1.0, 5)


def test_defaults_at_their_borders() -> None:
    assert [default_lr(n) for n in (10**9 - 1, 10**9)] == [1e-3, 5e-4]
    assert [default_lr(n, True) for n in (3 * 10**9 - 1, 3 * 10**9)] == [0.01, 0.005]
    assert [default_refresh_every(n) for n in (3 * 10**9 - 1, 3 * 10**9)] == [200, 500]
    assert [default_rank(n, 600) for n in (25_296_895, 25_296_896, 25_296_897)] == [150, 128, 192]
    assert [default_rank(10, hidden) for hidden in (2, 7, 8)] == [1, 1, 2]


def test_what_may_change_on_resume() -> None:
    may = """steps micro_batch eval_every optim.lr optim.warmup optim.schedule optim.min_lr_ratio optim.clip
        optim.clip_mode optim.update optim.refresh_every optim.finder activations.checkpoint
        activations.recompute optim.scale optim.rounding
        optim.beta1 optim.moments optim.embed_moments optim.refresh optim.transport save_minutes""".split()
    may_not = """seed seq_len optim.name optim.rank optim.side optim.share optim.basis_dtype
        model.hidden_size tokens_per_step weights data.train activations.layers activations.group
        activations.init""".split()
    before = asdict(parse(["optim=galore"]).resolved())
    for key in may + may_not:
        cfg = parse(["optim=galore"]).resolved()
        put(cfg, key, "another")
        (line,) = differences(before, asdict(cfg))
        assert line.startswith(f"{key}=another: was ") and line.startswith(MAY_CHANGE) == (key in may)
    older = {k: v for k, v in before.items() if k != "activations"}
    assert differences(older, before) == [
        "activations.checkpoint=0.0: was None",
        "activations.recompute=none: was None",
    ]


def test_a_run_folder_knows_its_method(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def problem() -> str:
        with pytest.raises(ConfigError) as caught:
            from_yaml(path)
        (line,) = caught.value.problems
        return line

    path.write_text("optim:\n  name: galore\n  rank: 12\n")
    assert from_yaml(path).optim == ProjectedConfig(name="galore", rank=12)
    path.write_text("optim:\n  name: adamw\n  rank: 12\n")
    assert problem().startswith(f"{path}: optim.rank=12: belongs to low-rank methods; choose optim=adarank")
    for name in ("galor", "../model/llama_7b", "null"):
        path.write_text(f"optim:\n  name: {name}\n")
        assert problem().startswith(f"{path}: optim.name={name.replace('null', 'None')}: no such method; ")
        assert "galore_8bit" in problem()


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
        ["optim=galore_8bit", "optim.side=both", "optim.share=false", "activations.checkpoint=0.5"],
        ["optim=galore_sgd", "model=llama_7b"],
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
    assert max(map(len, lines)) <= 80 and len(lines) <= 120 and text.isascii()
    words = set(re.split(r"[\s,:;]+", text))
    for group in GROUPS:
        assert {group, *group_options(group)} <= words
    for cfg in (
        Config(),
        Config(optim=ProjectedConfig()),
        Config(optim=NaturalConfig()),
        Config(optim=AdapterConfig()),
        Config(optim=AdaRankConfig()),
    ):
        for key in leaves(cfg):
            if key in ("optim.name", "data.name"):
                continue
            value = get(cfg, key)
            shown = {"None": "null", "False": "false", "True": "true"}.get(str(value), value)
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


def test_the_7b_recipe_is_the_published_run() -> None:
    cfg = parse(["experiment=llama_7b"]).resolved()
    assert (cfg.optim.name, cfg.data.name, cfg.run.name) == (
        "gradnormlorp_8bit", "c4", "llama_7b_gradnormlorp_8bit_0"
    )  # fmt: skip
    assert isinstance(cfg.optim, ProjectedConfig)
    assert (cfg.optim.rank, cfg.optim.refresh_every, cfg.optim.lr) == (1024, 250, 0.005)
    assert cfg.steps * cfg.tokens_per_step == 80_000 * 512 * 256 and cfg.accumulation(1) == 32


def test_the_makefile_reads_the_quickstart_run() -> None:
    cfg, make = parse(["experiment=quickstart"]), (ROOT / "Makefile").read_text()
    assert f"OPTIM ?= {cfg.optim.name}\n" in make and "quickstart optim=$(OPTIM) " in make
    for name in ("adamw", "galore_8bit"):
        cfg = parse(["experiment=quickstart", f"optim={name}"])
        assert f"RUN := {cfg.run.dir}/{cfg.run.name}\n".replace(name, "$(OPTIM)") in make


@kills(
    "configs/schema.py",
    "kept = (self.keep_last - 1) * self.save_every",
    "kept = self.keep_last * self.save_every",
)
def test_rewind_keeps_a_save_from_before() -> None:
    parse(["spike=rewind", "keep_last=3", "save_every=10"])
    with pytest.raises(
        ConfigError, match="keep_last=2: with spike=rewind and save_every=10 .* give 3 or more"
    ):
        parse(["spike=rewind", "keep_last=2", "save_every=10"])


@kills("configs/schema.py", "if getattr(self, key) != off:", "if False:")
def test_a_search_for_an_lr_ignores_nothing() -> None:
    for typed in ("spike=skip", "spike=rewind", "profile=true"):
        with pytest.raises(ConfigError, match=f"{typed}: would be ignored with optim.lr_range=true"):
            parse(["optim.lr_range=true", typed])
