"""The dense optimizer against torch.optim.AdamW and against its own definition."""

import copy

import pytest
import torch
from torch import nn

import kernels
from optim import attach
from optim.rules.adam import Adam
from optim.rules.sgd import Sgd
from tests.mutants import kills


def small(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 16),
            "layers": nn.ModuleList([nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)]),
            "head": nn.Linear(16, 50, bias=False),
        }
    ).to(dtype)


def loss_of(model, tokens):
    h = model["embed"](tokens)
    for layer in model["layers"]:
        h = layer(h)
    return nn.functional.cross_entropy(model["head"](h), tokens.roll(-1))


def batches(n, size=12):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (size,), generator=g) for _ in range(n)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


DECAYED = ("layers.0.weight", "layers.2.weight", "head.weight")


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_torch_adamw(dtype, tol):
    """lr changing every step, decay on matrices and head only, clipping on."""
    ours, theirs = small(dtype), small(dtype)
    opt = attach(ours, "adamw", lr=1e-2, decay=0.1, clip=0.3, beta2=0.98)
    named = dict(theirs.named_parameters())
    ref = torch.optim.AdamW(
        [
            {"params": [named[n] for n in DECAYED], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in DECAYED], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    clipped = 0
    for step, tokens in enumerate(batches(12)):
        for group in [*opt.param_groups, *ref.param_groups]:
            group["lr"] = 1e-2 / (1 + step)
        loss_of(ours, tokens).backward()
        loss_of(theirs, tokens).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        clipped += norm > 0.3
        opt.step()
        ref.step()
        opt.zero_grad()
        ref.zero_grad()
        torch.testing.assert_close(opt.stats["grad_norm"], norm, rtol=tol, atol=0)
    assert clipped > 0
    assert (weights(ours) - weights(theirs)).norm() <= tol * weights(theirs).norm()


def test_scale_multiplies_the_lr_of_matrices_in_blocks_only():
    plain, scaled = small(), small()
    before = dict(copy.deepcopy(plain).named_parameters())
    for model, scale in ((plain, 1.0), (scaled, 0.25)):
        opt = attach(model, "adamw", lr=1e-2, scale=scale)
        loss_of(model, batches(1)[0]).backward()
        opt.step()
    for name, p in plain.named_parameters():
        a, b = p - before[name], dict(scaled.named_parameters())[name] - before[name]
        factor = 0.25 if name in ("layers.0.weight", "layers.2.weight") else 1.0
        torch.testing.assert_close(b, factor * a, rtol=1e-12, atol=1e-15)


def test_decay_is_decoupled_and_comes_first():
    model = small()
    opt = attach(model, "adamw", lr=1e-2, decay=0.5, scale=0.25)
    before = copy.deepcopy(model)
    (0.0 * sum(p.sum() for p in model.parameters())).backward()  # gradients of exactly zero: only decay acts
    opt.step()
    for (name, p), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(p, old * (1 - 1e-2 * 0.5) if name in DECAYED else old), name


def test_micro_batches_equal_one_batch():
    one, many = small(), small()
    opt1 = attach(one, "adamw", lr=1e-2, clip=0.3)
    opt4 = attach(many, "adamw", lr=1e-2, clip=0.3, accum_steps=4)
    for tokens in batches(5, size=16):
        logits = one["head"](one["layers"][2](one["layers"][1](one["layers"][0](one["embed"](tokens)))))
        nn.functional.cross_entropy(logits, tokens, reduction="sum").div(16).backward()
        opt1.step()
        opt1.zero_grad()
        for part in tokens.split(4):
            logits = many["head"](
                many["layers"][2](many["layers"][1](many["layers"][0](many["embed"](part))))
            )
            nn.functional.cross_entropy(logits, part, reduction="sum").div(16).backward()
        opt4.step()
        opt4.zero_grad()
    assert (weights(one) - weights(many)).norm() <= 1e-12 * weights(one).norm()


def test_a_non_finite_gradient_skips_its_matrix_whole():
    model, twin = small(), small()
    opt, ref = attach(model, "adamw", lr=1e-2), attach(twin, "adamw", lr=1e-2)
    for step, tokens in enumerate(batches(4)):
        for m in (model, twin):
            loss_of(m, tokens).backward()
        before = copy.deepcopy(opt.state_dict()["state"])
        if step == 1:
            model["layers"][0].weight.grad[3, 2] = float("nan")
            kept = model["layers"][0].weight.clone()
        opt.step()
        ref.step()
        if step == 1:
            assert torch.equal(model["layers"][0].weight, kept)
            after = opt.state_dict()["state"]
            for key, value in before["layers.0.weight"].items():
                assert torch.equal(after["layers.0.weight"][key], value), key
            assert torch.equal(model["head"].weight, twin["head"].weight)  # the others were updated
            assert int(opt.stats["skipped"]) == 1 and int(opt.stats["skipped_in_a_row"]) == 1
            assert torch.isfinite(opt.stats["grad_norm"])
        else:
            assert int(opt.stats["skipped"]) == 0 and int(opt.stats["skipped_in_a_row"]) == 0
        for o in (opt, ref):
            o.zero_grad()
    assert torch.isfinite(weights(model)).all()
    state = opt.state_dict()["state"]
    assert int(state["layers.0.weight"]["t"]) == 3 and int(state["head.weight"]["t"]) == 4


def test_state_dict_is_by_name_and_resumes_bitwise():
    model, again = small(torch.float32), small(torch.float32, seed=5)
    opt, tokens = attach(model, "adamw", lr=1e-2), batches(6)
    for t in tokens[:3]:
        loss_of(model, t).backward()
        opt.step()
        opt.zero_grad()
    saved = copy.deepcopy(opt.state_dict())
    assert set(saved["state"]) == {n for n, _ in model.named_parameters()} | {"engine"}
    again.load_state_dict(model.state_dict())
    opt2 = attach(again, "adamw", lr=1.0)
    opt2.load_state_dict(saved)
    for t in tokens[3:]:
        for m, o in ((model, opt), (again, opt2)):
            loss_of(m, t).backward()
            o.step()
            o.zero_grad()
    assert torch.equal(weights(model), weights(again))
    saved["state"]["head.weight"]["m"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"head\.weight.*\(3,\)"):
        opt2.load_state_dict(saved)
    del saved["state"]["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight"):
        opt2.load_state_dict(saved)


def test_a_step_is_closed():
    model = small()
    opt = attach(model, "adamw", lr=1e-2, accum_steps=2)
    with pytest.raises(RuntimeError, match=r"0 backward.*accum_steps=2"):
        opt.step()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"1 backward.*accum_steps=2"):
        opt.step()
    opt.zero_grad()
    for tokens in batches(2):
        model["head"](model["embed"](tokens)).sum().backward()  # the blocks are not used
    with pytest.raises(RuntimeError, match=r"layers\.0\.weight"):
        opt.step()


def test_every_parameter_is_owned_once_and_tied_weights_too():
    model = small()
    model["head"].weight = model["embed"].weight
    opt = attach(model, "adamw", lr=1e-2, decay=0.1)
    owned = [id(p) for g in opt.param_groups for p in g["params"]]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()})
    assert [u.role for u in opt.units if u.name == "embed.weight"] == ["embedding"]
    assert all(line in opt.table() for line in ("embed ", "layers.* ", "layers.*.bias "))


def test_detach_leaves_a_plain_model():
    model = small()
    names = list(model.state_dict())
    opt = attach(model, "adamw", lr=1e-2)
    assert list(model.state_dict()) == names
    opt.detach()
    loss_of(model, batches(1)[0]).backward()
    assert not any(any(u.fired) for u in opt.units)


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("adamv", {}, "adamv"),
        ("adamw", {"lr": -1.0}, "-1.0"),
        ("adamw", {"rnak": 4}, "rnak"),
        ("adamw", {"beta2": 1.0}, "beta2"),
        ("adamw", {"moments": "int4"}, "int4"),
        ("adamw", {"reduce": "sum"}, "process group"),
        ("adamw", {"accum_steps": 0}, "accum_steps=0"),
    ],
)
def test_attach_refuses_what_it_cannot_do(method, settings, says):
    with pytest.raises(ValueError, match=says):
        attach(small(), method, **settings)


def test_bf16_second_moment_falls_as_it_should():
    """Unit gradients, then ten times smaller: v must follow, as it never does rounded to nearest."""
    w = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    opt = attach(w, "adamw", lr=0.0 + 1e-9, moments="bf16")
    for size, steps in ((1.0, 1500), (0.1, 1500)):
        for _ in range(steps):
            (w.weight * size).sum().backward()  # a gradient of `size` everywhere
            opt.step()
            opt.zero_grad()
    v, exact = opt.state[w.weight]["v"], 0.0
    for size in [1.0] * 1500 + [0.1] * 1500:
        exact = 0.999 * exact + 0.001 * size**2
    assert v.dtype == torch.bfloat16
    assert abs(v.float().mean() / exact - 1) < 0.02


def test_stochastic_rounding_is_unbiased_and_a_function_of_the_seed():
    x = torch.rand(4096) * 3 + 1e-3

    def draw(t, index=0):
        return kernels.stochastic_bf16(x, torch.tensor(float(t)), torch.tensor(float(index))).float()

    draws = [draw(t) for t in range(200)]
    step = 2.0 ** (torch.floor(torch.log2(x)) - 7)  # one bf16 unit in the last place
    assert all(((d - x).abs() < step).all() for d in draws)
    mean_error = (torch.stack(draws).mean(0) - x) / step
    assert mean_error.abs().max() < 6 * 0.5 / 200**0.5  # sd of one draw is at most half a unit
    assert mean_error.mean().abs() < 4 * 0.5 / (200 * 4096) ** 0.5
    assert torch.equal(draws[3], draw(3))
    assert not torch.equal(draws[3], draws[4]) and not torch.equal(draws[3], draw(3, index=1))
    special = torch.tensor([float("inf"), -float("inf"), 0.0, 1.0])
    assert torch.equal(
        kernels.stochastic_bf16(special, torch.tensor(1.0), torch.tensor(0.0)).float(), special
    )


def sixteenth(kind, w, t, noise):
    """w, of numbers in [1, 2), falls by 2^-11: a sixteenth of the distance between those in bf16."""
    h = torch.tensor([2.0**-11, 1, 1, 1, t, 3, 1, 1])
    if kind == "grouped":
        parts = torch.stack([w.new_full((64, 16), -h[0], dtype=h.dtype), h.new_ones(64, 16)])
        kernels.grouped_(w, parts, w.new_full((4,), 0.5), 0.0, None, h if noise else None)
        return
    rule = Adam(0.0, 0.0, 0.0) if kind == "adam" else Sgd()
    state = rule.begin("fp32", w.shape, w.device, h.dtype)
    rule.update_([w], [torch.ones_like(w)], [state], h[None], None, noise)


@kills("kernels/reference.py", "new, w.to(wide)), h if noise else None)", "new, w.to(wide)), None)")
@kills("kernels/reference.py", "u.flatten(1), h)", "u.flatten(1), None)")
@kills("kernels/reference.py", "h[Column.T], h[Column.INDEX], high", "h[Column.LR], h[Column.INDEX], high")
@kills("kernels/dispatch.py", "table[n], beta1, beta2, eps, noise)", "table[n], beta1, beta2, eps)")
@kills("optim/rules/adam.py", "self.eps, noise)", "self.eps, False)")
@kills("optim/rules/adam.py", "self.eps, noise)", "self.eps, True)")
@kills("optim/rules/rule.py", "new, h if noise else None)", "new, None)")
@kills("optim/rules/rule.py", "new, h if noise else None)", "new, h)")
@pytest.mark.parametrize("kind", ["adam", "sgd", "grouped"])
def test_small_updates_add_up_unless_rounded_to_nearest(kind):
    """64 of a sixteenth: 4 on average, with a deviation of (64 * 1/16 * 15/16)^0.5, each number by itself."""
    w, still = (torch.full((64, 64), 1.5).bfloat16() for _ in range(2))
    for t in range(1, 65):
        sixteenth(kind, w, t, True)
        sixteenth(kind, still, t, False)
    assert torch.equal(still, torch.full_like(still, 1.5))
    fell, deviation = (1.5 - w.float()) * 2**7, (64 * 15 / 256) ** 0.5
    assert abs(fell.mean() - 4) < 5 * deviation / 4096**0.5
    assert abs(fell.std() / deviation - 1) < 5 / (2 * 4096) ** 0.5


@kills("kernels/reference.py", "h[Column.INDEX], high=True", "h[Column.INDEX]")
def test_a_weight_has_random_bits_of_its_own():
    """Not those of its second moment, of the same update and index; by place, however its rows lie."""
    x, h = torch.rand(64, 30) + 1, torch.tensor([0.0, 1, 1, 1, 5, 7, 1, 1])
    w, apart = torch.empty(64, 30).bfloat16(), torch.empty(64, 33).bfloat16()[:, :30]
    for t in (w, apart):
        kernels.write_(t, x, h)
    moment = kernels.stochastic_bf16(x.flatten(), h[4], h[5]).view(64, 30)
    assert torch.equal(w, apart) and 0.2 < (w != moment).float().mean() < 0.5  # independent: a third


def drift(dtype, rounding, updates=300):
    """By parameter: how far updates of 2^-14 took it on average, over what they sum to; five standard
    deviations of that."""
    model = small(dtype)
    opt = attach(model, "adamw", lr=2.0**-14, rounding=rounding)
    g = torch.Generator().manual_seed(2)
    signs = [torch.randn(p.shape, generator=g).sign().to(dtype) for p in model.parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(updates):
        sum((p * s).sum() for p, s in zip(model.parameters(), signs, strict=True)).backward()
        opt.step()
        opt.zero_grad()
    went, sigma = {}, {}
    for (name, p), w, s in zip(model.named_parameters(), start, signs, strict=True):
        p = p.detach()
        went[name] = float(((w - p) * s).float().mean()) / (updates * 2.0**-14)
        unit = 2.0 ** (torch.floor(torch.log2(torch.maximum(w.abs(), p.abs()).max())) - 7)
        sigma[name] = 5 * float(unit / (p.numel() * updates * 2.0**-14)) ** 0.5
    return went, sigma, model


@kills("optim/attach.py", 'u.noise = cfg.rounding == "stochastic"', "u.noise = False")
@kills("optim/attach.py", 'u.noise = cfg.rounding == "stochastic"', "u.noise = True")
@kills("optim/landing.py", "self._plans[key], units[0].noise)", "self._plans[key], False)")
def test_every_bf16_weight_follows_a_low_rate():
    """Embedding, matrices, biases, gains, head; to nearest gains of 1 stay, and matrices lose most of it."""
    went, sigma, _ = drift(torch.bfloat16, "stochastic")
    lost, _, _ = drift(torch.bfloat16, "nearest")
    assert len(went) == 8 and max(sigma.values()) < 0.7
    for name, share in went.items():
        assert abs(share - 1) < sigma[name], (name, share)
        assert lost[name] < 0.6 or "bias" in name, (name, lost[name])
    assert lost["layers.1.weight"] == 0


def test_fp32_weights_are_rounded_one_way():
    (_, _, one), (_, _, other) = (drift(torch.float32, r, 5) for r in ("stochastic", "nearest"))
    assert torch.equal(weights(one), weights(other))


@kills("optim/memory.py", "all(u.param.dtype != torch.bfloat16", "any(u.param.dtype == torch.bfloat16")
@kills("optim/memory.py", "u.noise and u.param.dtype == torch.bfloat16", "u.noise")
@kills("optim/memory.py", "u.noise and u.param.dtype == torch.bfloat16", "u.param.dtype == torch.bfloat16")
def test_the_table_says_how_weights_are_rounded():
    said = {
        (dtype, rounding): "rounding  bf16 weights stochastically"
        in attach(small(dtype), "adamw", rounding=rounding).table()
        for dtype in (torch.bfloat16, torch.float32)
        for rounding in ("stochastic", "nearest")
    }
    assert [key for key, found in said.items() if found] == [(torch.bfloat16, "stochastic")]
    for dtype, rounding in said:
        idle = "changes nothing" in attach(small(dtype), "adamw", rounding=rounding).table()
        assert idle == ((dtype, rounding) == (torch.float32, "nearest"))


@kills("kernels/reference.py", "return m / h[Column.FIX1]", "return m")
@kills("kernels/reference.py", "torch.sqrt(v) / torch.sqrt(h[Column.FIX2])", "torch.ones_like(v)")
@kills("optim/scalars.py", "self.table[:, Column.T] = self.t + 1", "self.table[:, Column.T] = self.t + 2")
def test_adam_is_bounded_invariant_10():
    """At lr 1: |step| = 1 at t = 1, at most (1 - b1) / sqrt((1 - b2)(1 - b1^2 / b2)) = 7.27 ever (eps 0)."""
    model = nn.Linear(1, 100, bias=False).double()
    opt = attach(model, "adamw", lr=1.0, eps=1e-300)
    bound = 0.1 / ((1 - 0.999) * (1 - 0.81 / 0.999)) ** 0.5
    for t in range(1, 60):
        before = model.weight.detach().clone()
        x = torch.randn(1, 1, dtype=torch.float64) * 10 ** torch.empty(1, 1, dtype=torch.float64).uniform_(
            -3, 3
        )
        model(x).sum().backward()
        opt.step()
        opt.zero_grad()
        moved = (model.weight - before).abs()
        assert moved.max() <= bound * (1 + 1e-9)
        if t == 1:
            torch.testing.assert_close(moved, torch.ones_like(moved), rtol=1e-9, atol=0)


def test_bias_corrections_keep_their_digits():
    got = Adam().scalars(torch.tensor([1.0, 2.0, 1000.0]))
    want = torch.tensor([[1 - b**t for b in (0.9, 0.999)] for t in (1, 2, 1000)])
    torch.testing.assert_close(got, want, rtol=2e-7, atol=0)
