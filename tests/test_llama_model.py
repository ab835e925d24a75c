"""Shapes, counts, initialisation, rotary embedding and norm, autocast, compilation."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from llama.model import (
    Llama,
    ModelConfig,
    RMSNorm,
    build_model,
    compile_blocks,
    eager,
    empty_model,
    flops_per_token,
    num_params,
    rope_tables,
    rotate,
)

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
COUNTS = {  # the published shapes' exact totals
    "9m": 8_995_968,
    "20m": 19_548_416,
    "35m": 35_197_824,
    "40m": 42_392_480,
    "60m": 58_073_600,
    "71m": 70_578_688,
    "100m": 100_117_120,
    "130m": 134_105_856,
    "250m": 247_370_496,
    "350m": 367_969_280,
    "1b": 1_339_082_752,
    "3b": 2_685_831_680,
    "7b": 6_738_415_616,
    "tiny": 2 * 2048 * 128 + 802_816 + 9 * 128,
}
SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4)


def shipped(size):
    values = yaml.safe_load((CONFIGS / f"llama_{size}.yaml").read_text())
    assert values.pop("defaults") == ["/schema/model/llama@_here_"]
    return ModelConfig(**values)


def test_every_shipped_size_has_a_count():
    assert {p.stem.removeprefix("llama_") for p in CONFIGS.glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    cfg = shipped(size)
    assert not cfg.problems()
    with torch.device("meta"):
        model = Llama(cfg)
    assert sum(p.numel() for p in model.parameters()) == num_params(cfg) == COUNTS[size]


@pytest.mark.parametrize("extra", [{"tie_word_embeddings": True}, {"num_key_value_heads": 2}])
def test_parameter_count_of_other_shapes(extra):
    cfg = ModelConfig(**SMALL, **extra)
    with torch.device("meta"):
        assert num_params(cfg) == sum(p.numel() for p in Llama(cfg).parameters())


def test_shipped_files_hold_only_what_differs():
    default = ModelConfig()
    for path in CONFIGS.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert all(getattr(default, key) != v for key, v in values.items() if key != "defaults"), path


def test_flops_counts_the_matrices_three_times_two():
    cfg = shipped("60m")
    attention = 8 * 256 * 512 * 6  # causal half of 12 L h S
    assert flops_per_token(cfg, 256) == 6 * (25_296_896 + 32000 * 512) + attention


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"num_attention_heads": 7, "hidden_size": 128}, "num_attention_heads=7: does not divide"),
        (
            {"num_attention_heads": 128, "hidden_size": 128},
            "num_attention_heads=128: head dimension 1 is odd",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide model.num_attention_heads=8"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: outside 1 to 1024"),
        ({"vocab_size": 255}, "vocab_size=255: outside 256 to 1000000"),
        ({"vocab_size": 1_000_001}, "vocab_size=1000001"),
        ({"hidden_size": 513}, "hidden_size=513: odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"intermediate_size": -1}, "intermediate_size=-1"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"init_from": "/no/such"}, "init_from=/no/such: no config.json there"),
    ],
)
def test_problems_name_key_and_value(values, expected):
    (line,) = ModelConfig(**values).problems()
    assert line.startswith(f"model.{expected}")


def test_problems_are_all_reported_and_suggest_values_that_work():
    assert len(ModelConfig(vocab_size=1, rope_theta=0, num_hidden_layers=9999).problems()) == 3
    (line,) = ModelConfig(hidden_size=128, num_attention_heads=7).problems()
    assert line.endswith("use 8 or 4")
    for heads in (8, 4):
        assert not ModelConfig(hidden_size=128, num_attention_heads=heads).problems()


def test_gradcheck_norm():
    norm = RMSNorm(6, 1e-6).double()
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
    )
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=0)


def test_gradcheck_rotation_and_its_meaning():
    x = torch.randn(
        2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    cos, sin = rope_tables(5, 8, 100.0, "cpu", torch.float64)
    assert cos.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    # entries (j, j + d/2) as a complex number turn by position * theta^(-2j/d)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    turn = torch.arange(5.0)[:, None].double() * 100.0 ** (-torch.arange(4).double() / 4)
    expected = pairs * torch.polar(torch.ones_like(turn), turn)[:, None]
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((expected.real, expected.imag), -1))


def test_rope_tables_of_a_bf16_model_are_fp32():
    assert rope_tables(3, 8, 1e4, "cpu", torch.bfloat16)[0].dtype == torch.float32


def test_float64_model_computes_in_float64():
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float64, 0)
    kinds = set()
    hooks = [m.register_forward_hook(lambda m, i, o: kinds.add(o.dtype)) for m in model.modules()]
    x = torch.arange(12).view(2, 6)
    assert model(x, x).dtype == torch.float64 and kinds == {torch.float64} and hooks


def test_loss_is_the_sum_over_the_logits():
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float64, 0)
    x, y = torch.arange(12).view(2, 6), torch.arange(12, 24).view(2, 6)
    y[1, 3:] = -100
    expected = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(model(x, y), expected, rtol=1e-13, atol=0)


def test_causal():
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float64, 0)
    x = torch.arange(10)[None]
    changed = x.clone()
    changed[0, 6:] += 50
    a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(a[:, 6], b[:, 6])


@pytest.mark.parametrize("tied", [False, True])
def test_state_is_the_parameters_and_untied_has_a_head(tied):
    model = build_model(ModelConfig(**SMALL, tie_word_embeddings=tied), "cpu", torch.float32, 0)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in model.state_dict()) != tied
    assert not list(model.buffers())


def test_initialisation_fills_everything_and_depends_on_the_seed_only():
    cfg = ModelConfig(**{**SMALL, "hidden_size": 128})
    one = empty_model(cfg, "cpu", torch.float32)
    for p in one.parameters():
        p.data.fill_(float("nan"))
    torch.rand(7)  # the global generator has no part in it
    one.init_weights(11)
    two, other = build_model(cfg, "cpu", torch.float32, 11), build_model(cfg, "cpu", torch.float32, 12)
    half = build_model(cfg, "cpu", torch.bfloat16, 11)
    for (name, p), q, r, b in zip(
        one.named_parameters(), *(m.parameters() for m in (two, other, half)), strict=True
    ):
        assert torch.equal(p, q), name
        assert torch.equal(p.bfloat16(), b), name
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert not torch.equal(p, r), name
            assert abs(p.std() / 0.02 - 1) < 0.03 and abs(p.mean()) < 0.001, name
    weights = [p.flatten()[:8] for p in one.parameters() if p.ndim > 1]
    assert len({tuple(w.tolist()) for w in weights}) == len(weights)


def test_autocast_runs_matrices_in_bf16_and_keeps_fp32_gradients():
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float32, 0)
    x = torch.arange(12).view(2, 6)
    exact = model(x, x)
    kinds = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: kinds.add(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x)
    loss.backward()
    assert kinds == {torch.bfloat16} and loss.dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.01 * exact
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def loss_and_gradients(model, x, y):
    model.zero_grad()
    loss = model(x, y)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def calls_of(model):
    """Counts how often each block starts: twice when it is computed again."""
    counts = [0] * len(model.model.layers)
    for n, layer in enumerate(model.model.layers):

        def count(module, args, n=n):
            counts[n] += 1

        layer.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize(("share", "blocks"), [(0.0, 0), (0.1, 0), (0.2, 1), (0.5, 2), (0.67, 2), (1.0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(share, blocks, dtype):
    model = build_model(ModelConfig(**SMALL), "cpu", dtype, 0)
    x, y = torch.arange(12).view(2, 6), torch.arange(12, 24).view(2, 6)
    expected = loss_and_gradients(model, x, y)
    model.checkpoint_blocks(share)
    assert model.model.checkpointed == blocks == round(share * 3)
    counts = calls_of(model)
    for a, b in zip(loss_and_gradients(model, x, y), expected, strict=True):
        assert torch.equal(a, b)
    assert counts == [2] * blocks + [1] * (3 - blocks)
    with torch.autocast("cpu", torch.bfloat16):
        loss_and_gradients(model, x, y)


def test_recomputing_keeps_less_and_leaves_evaluation_alone():
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float32, 0)
    x, y = torch.arange(12).view(2, 6), torch.arange(12, 24).view(2, 6)

    def kept():
        sizes = {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x, y)
        return sum(sizes.values())

    all_of_it = kept()
    model.checkpoint_blocks(1.0)
    assert kept() < 0.6 * all_of_it
    model.eval()
    assert kept() == all_of_it
    model.train()
    called = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.model.checkpoint", lambda *a, **k: called.append(a))
        model(x, y)
    assert not called


def test_compiled_blocks_can_be_recomputed():
    torch._dynamo.reset()
    model = build_model(ModelConfig(**SMALL), "cpu", torch.float32, 0)
    x, y = torch.arange(12).view(2, 6), torch.arange(12, 24).view(2, 6)
    compile_blocks(model)
    expected = loss_and_gradients(model, x, y)
    model.checkpoint_blocks(0.67)
    counts = calls_of(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for a, b in zip(loss_and_gradients(model, x, y), expected, strict=True):
                assert torch.equal(a, b)
    assert counts == [4, 4, 2]


def test_compiled_blocks_share_one_training_and_one_evaluation_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    cfg = ModelConfig(**SMALL)
    model = build_model(cfg, "cpu", torch.float32, 0)
    x, y = torch.arange(12).view(2, 6), torch.arange(12, 24).view(2, 6)
    expected = loss_and_gradients(model, x, y)
    names = list(model.state_dict())
    compile_blocks(model)
    for _ in range(2):
        for a, b in zip(loss_and_gradients(model, x, y), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert list(model.state_dict()) == names

    # graphs are counted without the compiler behind them: blocks and last norm, training and evaluation
    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile
    torch.compile = lambda f, **kw: real(f, backend=counter, **kw)
    try:
        compile_blocks(model)
    finally:
        torch.compile = real
    for _ in range(2):
        loss_and_gradients(model, x, y)
        with torch.no_grad():
            model.eval()(x, y)
        model.train()
        with eager(model), torch.no_grad():
            model(x[:, :3])
    assert counter.frame_count == 4

    twin = copy.deepcopy(model)
    twin.init_weights(1)
    torch.testing.assert_close(twin(x, y), build_model(cfg, "cpu", torch.float32, 1)(x, y))
    torch.testing.assert_close(model(x, y), expected[0])
