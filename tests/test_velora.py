"""VeLoRA: layers against dense ones trained on x Q Q^T, directions, what is kept, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import train as program
from configs.cli import parse
from configs.schema import ConfigError, from_yaml, to_yaml
from llama import checkpoint
from llama.model import Llama, ModelConfig, build_model
from optim import Velora, attach
from optim.layer import _Project, coordinate
from optim.memory import entries
from optim.methods import METHODS, Method
from tests.mutants import kills
from tests.test_attach import reachable, stored
from tests.tiny import Tiny, batches, compile_blocks, flat, keys, moved, parallel, shard, summed_loss, train

D = torch.float64
HOW = Velora(["v", "down"], {"v": 4, "down": 8})
START = flat(Tiny())
METHODS_TESTED = ["adamw", "adamw_8bit", "galore", "galore_8bit", "gradnormlorp", "gradnormlorp_adapter",
                  "natural_galore", "adarankgrad", "galore_sgd"]  # fmt: skip


def observe(model, opt, tokens, micro=1):
    with opt.observing():
        for part in tokens.chunk(micro):
            model(part)


def run(method="adamw", how=HOW, micro=1, model=None, steps=4, **settings):
    """A trained Tiny, its optimizer and losses."""
    model, tokens = model or Tiny(), batches(steps)
    opt = attach(model, method, accum_steps=micro, velora=how, **{**keys(method), **settings})
    observe(model, opt, tokens[0], micro)
    return model, opt, train(model, opt, tokens, micro)


def close(a, b, tol=1e-12):
    assert moved(a, START) > 1e-2
    assert (flat(a) - flat(b)).norm() <= tol * moved(a, START)


# ---- the layer


def products(x, dy, w, v):
    """y, dX and A of one layer."""
    coord = coordinate(len(w), w.shape[1] // len(v), dtype=D, device=torch.device("cpu"))
    x = x.clone().requires_grad_()
    y = _Project.apply(x, w, coord, None, None, v, None, None, None, None)
    y.backward(dy)
    return y.detach(), x.grad, coord.grad


@kills("optim/layer.py", "unflatten(-1, (-1, len(q)))", "unflatten(-1, (len(q), -1)).transpose(-1, -2)")
@kills("optim/layer.py", "kept = kept @ q.to(wide)", "kept = 1.01 * kept @ q.to(wide)")
def test_gradients_of_a_layer_invariants_32_and_33():
    """Forward and dX exact; the weight's gradient (dY^T z) (x) v, exact if sub-tokens are multiples of v."""
    g = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(*s, generator=g, dtype=D) for s in ((5, 12), (2, 6, 12), (2, 6, 5)))
    v = F.normalize(torch.randn(4, generator=g, dtype=D), dim=0)
    q = torch.kron(torch.eye(3, dtype=D), v[:, None])
    multiples = (torch.randn(2, 6, 3, 1, generator=g, dtype=D) * v).flatten(2)
    for x_, exact in ((x, False), (multiples, True)):
        y, dx, a = products(x_, dy, w, v)
        whole = dy.flatten(0, 1).T @ x_.flatten(0, 1)
        torch.testing.assert_close(y, x_ @ w.T, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dx, dy @ w, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(a, whole @ q, rtol=1e-13, atol=1e-13)
        gradient = (a[:, :, None] * v).flatten(1)
        torch.testing.assert_close(gradient @ q @ q.T, gradient, rtol=1e-13, atol=1e-13)
        assert torch.linalg.matrix_rank(gradient) <= 3
        assert ((gradient - whole).norm() <= 1e-13 * whole.norm()) == exact
    coord = torch.zeros(5, 3, dtype=D)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: _Project.apply(x, w, coord, None, None, v, None, None, None, None), (x,)
    )


class Compressed(nn.Module):
    """y and dX of the linear layer, and for its weight the gradient of x Q Q^T."""

    def __init__(self, linear, q):
        super().__init__()
        self.weight, self.bias, self.q = linear.weight, linear.bias, q.clone()

    def forward(self, x):
        rest, seen = self.weight.detach(), x.detach() @ self.q @ self.q.T
        return F.linear(x, rest, self.bias) + F.linear(seen, self.weight) - F.linear(seen, rest)


def plain_with(opt):
    """A Tiny whose layers are Compressed where the optimizer's are VeLoRA's."""
    plain = Tiny()
    for u in opt.units:
        if u.grouped:
            path, _, name = u.name.removesuffix(".weight").rpartition(".")
            parent = plain.get_submodule(path)
            setattr(parent, name, Compressed(getattr(parent, name), u.q.q))
    return plain


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@kills("kernels/reference.py", "(parts[1, :, :, None] * d.abs() + eps)", "(parts[1, :, :, None] * d.abs())")
@kills("kernels/reference.py", "parts[1, :, :, None] * d.abs() +", "parts[1, :, :, None] * d.norm() +")
@kills("kernels/reference.py", "parts[0, :, :, None] * d /", "parts[0, :, :, None] /")
@kills("kernels/reference.py", "parts[0] *= -h[Column.LR]", "parts[0] *= -1.01 * h[Column.LR]")
@kills("kernels/reference.py", "w.to(wide) * keep) + u.flatten(1)", "w.to(wide)) + u.flatten(1)")
@kills("optim/velora.py", "return rules.Velora(rule.beta1", "return rules.Velora(rule.beta2")
def test_equals_dense_adam_on_the_compressed_input(eps, decay):
    """Factored Adam is Adam of the whole matrix, for any eps (invariant 33)."""
    model, tokens = Tiny(), batches(5)
    opt = attach(model, "adamw", lr=1e-2, eps=eps, decay=decay, velora=HOW)
    observe(model, opt, tokens[0])
    plain = plain_with(opt)
    matrices = [p for p in plain.parameters() if p.ndim == 2 and p is not plain.embed.weight]
    rest = [p for p in plain.parameters() if p.ndim == 1 or p is plain.embed.weight]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, eps=eps)
    assert train(model, opt, tokens) == pytest.approx(train(plain, adam, tokens), rel=1e-12)
    assert {u.shape for u in opt.units if u.grouped} == {(16, 4), (16, 3)}
    assert all(m.shape == u.shape for u in opt.units if u.grouped for m in u.state.values())
    close(plain, model)


@kills("kernels/reference.py", "parts.to(wide)[:, :, None] * d", "parts.to(wide)[:, :, None] * d.sign()")
def test_gradient_descent_is_that_of_the_whole_matrix():
    model, tokens = Tiny(), batches(3)
    opt = attach(model, "galore_sgd", **keys("galore_sgd"), velora=HOW)
    observe(model, opt, tokens[0])
    plain, names = plain_with(opt), [u.name for u in opt.units if u.grouped]
    (summed_loss(model, tokens[0]) / 60).backward()
    (summed_loss(plain, tokens[0]) / 60).backward()
    opt.step()
    for name in names:
        now, before = model.get_parameter(name), Tiny().get_parameter(name)
        step = -1e-2 * 50 * plain.get_parameter(name).grad
        torch.testing.assert_close(now.detach() - before.detach(), step, rtol=1e-10, atol=1e-14)


def test_sub_tokens_of_one_number_are_an_ordinary_layer_invariant_34():
    """m = 1, v = +-1; and evaluation is that of the plain model."""
    model, opt, losses = run(how=Velora(["v", "o", "down"], 1))
    plain = Tiny()
    assert train(plain, attach(plain, "adamw", lr=1e-2), batches(4)) == pytest.approx(losses, rel=1e-12)
    close(plain, model)
    opt.grouped[0].qs.fill_(math.nan)
    with torch.no_grad():
        assert model(batches(1)[0]).isfinite().all()
    opt.detach()
    assert {type(m) for m in model.modules()} == {type(m) for m in Tiny().modules()}


# ---- its direction


def inputs(name, model, tokens):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]


@kills(
    "optim/velora.py",
    "s.t() @ s if found.ndim == 2 else s.sum(0)",
    "s.t() @ s if found.ndim == 2 else s[0]",
)
@kills("optim/velora.py", "0.0))[1][:, -1]", "0.0))[1][:, 0]")
@kills("optim/velora.py", "v = found / torch.linalg.vector_norm(found)", "v = found")
@kills("optim/velora.py", "b.qs.copy_(torch.where(", "found.copy_(torch.where(")
def test_directions_are_of_the_first_step():
    tokens = batches(1)[0]
    x = inputs("layers.1.down_proj", Tiny(), tokens).reshape(-1, 8)
    leading = torch.linalg.svd(x)[2][0]
    for init, want in (("average", F.normalize(x.mean(0), dim=0)), ("svd", leading)):
        model = Tiny()
        opt = attach(model, "adamw", velora=Velora(["down"], 8, init))
        assert opt.unseen
        with pytest.raises(RuntimeError, match="observing"):
            model(tokens)
        with pytest.raises(RuntimeError, match="observing"), opt.observing():
            pass
        observe(model, opt, tokens, micro=3)
        v = opt.grouped[1].qs
        assert not opt.unseen and abs(float(v @ want)) == pytest.approx(1, abs=1e-12)
        assert float(v.norm()) == pytest.approx(1, abs=1e-12)
        model(tokens)
    opt = attach(Tiny(), "adamw", velora=Velora(["down"], 8, "random"))
    assert not opt.unseen and not torch.equal(opt.grouped[0].qs, opt.grouped[1].qs)


def test_layers_of_one_input_share_their_direction():
    model, opt, _ = run(how=Velora(["q", "k", "v", "gate", "up"], 4))
    assert [[u.name[9:10] for u in b.units] for b in opt.grouped] == [list("qkv"), list("gu")] * 2
    block = model.layers[0]
    assert block.q_proj.q is block.v_proj.q is not block.up_proj.q


@pytest.mark.parametrize("init", ["average", "svd"])
@pytest.mark.parametrize("bad", [0.0, math.nan])
@kills("optim/velora.py", "torch.isfinite(v).all(), v", "v.sum() != 0, v")
@kills("optim/velora.py", "torch.nan_to_num(found, 0.0, 0.0, 0.0)", "found")
def test_nothing_to_find_a_direction_from_leaves_some_one(bad, init):
    model = Tiny()
    with torch.no_grad():
        model.embed.weight.fill_(bad)
    opt = attach(model, "adamw", velora=Velora(["gate", "up"], 4, init))
    for layer in model.layers:  # LayerNorm of zeros is zero; so are v and with it what follows
        nn.init.zeros_(layer.o_proj.bias)
    observe(model, opt, batches(1)[0])
    for b in opt.grouped:
        assert float(b.qs.norm()) == pytest.approx(1, abs=1e-12)


# ---- modes of running


@pytest.mark.parametrize("method", METHODS_TESTED)
@kills("optim/velora.py", "found += ", "found[:] = ")
def test_micro_batches_equal_one_batch(method):
    one, opt, losses = run(method)
    many, _, summed = run(method, micro=4)
    close(one, many)
    assert losses == pytest.approx(summed, rel=1e-12) and len(opt.grouped) == 4
    assert all(u.mag is None for u in opt.units if u.grouped)


@pytest.mark.parametrize("method", ["adamw", "galore_8bit"])
def test_in_backward_equals_after_bitwise(method):
    settings = {} if method == "galore_8bit" else {"clip_mode": "off"}
    inside, _, a = run(method, update="in_backward", micro=2, **settings)
    after, _, b = run(method, update="after", micro=2, **settings)
    assert torch.equal(flat(inside), flat(after)) and a == b


@pytest.mark.parametrize("method", ["adamw", "galore_8bit"])
def test_checkpointed_equals_not(method):
    one, _, losses = run(method)
    for reentrant in (False, True):
        other, _, same = run(method, model=Tiny(checkpointing=reentrant))
        close(one, other)
        assert losses == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize("method", ["adamw", "galore", "gradnormlorp"])
@kills("optim/velora.py", "for b in e.grouped])", "for b in []])")
def test_compiled_equals_eager_with_one_graph(method):
    torch._dynamo.reset()
    eager, _, losses = run(method)
    model, tokens, graphs = Tiny(), batches(4), []
    opt = attach(model, method, velora=HOW, **keys(method))
    compile_blocks(model, backend=lambda gm, inputs: graphs.append(gm) or gm)
    observe(model, opt, tokens[0])
    assert train(model, opt, tokens) == pytest.approx(losses, rel=1e-12)
    close(eager, model)
    assert len(graphs) == 1


def test_clip_and_norm_are_of_the_compressed_gradient():
    """||A (x) v|| = ||A||: clipping is that of a dense optimizer on the compressed input."""
    model, tokens = Tiny(), batches(1)
    opt = attach(model, "adamw", lr=1e-2, eps=1e-2, clip=0.05, velora=HOW)
    observe(model, opt, tokens[0])
    plain = plain_with(opt)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-2)
    (summed_loss(plain, tokens[0]) / 60).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    adam.step()
    train(model, opt, tokens)
    assert float(opt.stats["grad_norm"]) == pytest.approx(float(norm), rel=1e-12)
    assert norm > 0.1 and (flat(model) - flat(plain)).norm() <= 1e-12 * (flat(plain) - START).norm()


def test_energy_is_of_the_other_layers():
    _, opt, _ = run("galore")
    rows = torch.tensor([u.projected and not u.grouped for u in opt.units])
    captured, estimate = opt.scalars.squares[rows].sum(0)
    assert float(opt.stats["energy"]) == pytest.approx(float(captured / estimate), rel=1e-12)


def on_rank(rank, world, method, rows):
    import torch.distributed as dist

    model, group, tokens = Tiny(), dist.group.WORLD, batches(4)
    if rows:
        group = shard(model, world)
    opt = attach(model, method, accum_steps=2, group=group, reduce="sum", velora=HOW, **keys(method))
    observe(model, opt, tokens[0].chunk(world)[rank], micro=2)
    train(model, opt, tokens, micro=2, rank=rank, world=world)
    return flat(model), opt.grouped[0].qs


@pytest.mark.parametrize(("method", "rows"), [("adamw_8bit", False), ("galore", False), ("galore", True)])
@kills("optim/velora.py", "    e.reduce.sum_(found)\n", "")
def test_ranks_equal_one_invariant_35(method, rows):
    one, opt, _ = run(method)
    for weights, v in parallel(2, on_rank, method, rows):
        torch.testing.assert_close(v, opt.grouped[0].qs, rtol=1e-12, atol=1e-13)
        tol = 1e-3 if method == "adamw_8bit" else 1e-11  # a code of 8 bits may round to the other side
        assert (weights - flat(one)).norm() <= tol * moved(one, START)


@pytest.mark.parametrize("method", METHODS_TESTED)
@kills(
    "optim/state.py", "for b in (*e.bases, *e.grouped):\n        found", "for b in e.bases:\n        found"
)
@kills("optim/unit.py", "self.own.copy_(qs)", "pass")
def test_resumes_bitwise(method):
    """No directions are looked for again: a later batch would give others."""
    model, opt, losses = run(method, steps=5)
    half, other, first = run(method, steps=3)
    fresh = Tiny(seed=1)
    again = attach(fresh, method, velora=HOW, **keys(method))
    fresh.load_state_dict(half.state_dict())
    again.load_state_dict(other.state_dict())
    assert not again.unseen and "velora layers.0.v_proj.weight" in other.state_dict()["state"]
    rest = train(fresh, again, batches(5)[3:])
    assert torch.equal(flat(fresh), flat(model)) and first + rest == losses


def test_a_non_finite_gradient_changes_nothing():
    model, opt, _ = run("adamw_8bit", steps=1)
    u = next(u for u in opt.units if u.grouped)
    before, state = u.param.clone(), {k: t.clone() for k, t in u.state.items()}
    u.leaves[0].register_hook(lambda g: g.index_fill(0, torch.tensor([3]), math.nan))
    train(model, opt, batches(1))
    assert torch.equal(u.param, before) and all(torch.equal(t, u.state[k]) for k, t in state.items())


@pytest.mark.parametrize("method", ["adamw_8bit", "galore"])
@kills("optim/velora.py", "args[0][..., : b.n]", "args[0]")
@kills("optim/layer.py", "kept[..., : coord.shape[1] * len(q)]", "kept")
@kills("optim/unit.py", "w[:, : self.q.n], n, self.q.qs", "w, n, self.q.qs")
def test_padding_shows_nowhere(method):
    """Sub-tokens of 5 of the 25 inputs of down, which are stored as 64."""
    x, ends = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0)), []
    for pad in (False, True):
        model = build_model(replace(SHAPES, intermediate_size=25, pad=pad), "cpu", D, 0)
        opt = attach(model, method, velora=Velora(["gate", "up", "down"]), **keys(method))
        observe(model, opt, x)
        for _ in range(3):
            model(x, x).backward()
            opt.step()
            opt.zero_grad()
        ends.append((flat(model), opt.state_dict()["state"]))
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.shape == (16, 64) and not down[:, 25:].any()
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


def test_a_run_stops_and_goes_on(command, tmp_path):
    """train.py lets the first step's micro-batches go forward once, and never again."""
    args = ["optim=galore_8bit", "optim.rank=8", "activations=velora", "activations.group={v:8,down:16}"]
    args += ["optim.schedule=constant", "optim.warmup=0", "micro_batch=2"]
    ends = []
    for name, stops in (("a", (4,)), ("b", (2, 4))):
        for steps in stops:
            assert program.main(command(tmp_path / name, f"steps={steps}", *args)) == 0
        save = checkpoint.latest(tmp_path / name / "r")
        ends.append({**load_file(save / "model.safetensors"), **load_file(save / "optim.safetensors")})
    assert any(k.startswith("velora ") for k in ends[0])
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][k]) for k, t in ends[0].items())


# ---- memory


def kept(model, call):
    """Numbers that a forward keeps for backward, parameters and what is as small as a basis excepted."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    own |= {
        layer.q.untyped_storage().data_ptr()
        for layer in model.modules()
        if getattr(layer, "q", None) is not None
    }
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(found.values())


@kills("optim/velora.py", "[project(layer) for layer in layers if layer.weight is u.param]", "[]")
@kills("optim/velora.py", "if magnitudes and ALONE", "if ALONE")
@kills("optim/velora.py", "before + out, f", "before, f")
def test_keeps_what_the_formula_says():
    """A token and block: n -> n / m of each input that nobody else keeps; the table names who does."""
    tokens = batches(1)[0]
    count = tokens.numel() * 2

    def all_kept(names, method="adamw"):
        model = Tiny()
        how = Velora(names, 4, "random") if names else None
        opt = attach(model, method, velora=how, **keys(method))
        return kept(model, lambda: model(tokens)), opt.table()

    plain, _ = all_kept([])
    down, text = all_kept(["down"])
    assert plain - down == count * (24 - 6) and "down: 6 numbers a token instead of 24;" in text
    value, text = all_kept(["v"])
    assert plain - value == count * -4 and "v: 4 numbers a token more, their input stays for q and k" in text
    every, text = all_kept(["q", "k", "v"])
    assert plain - every == count * (16 - 3 * 4) and "q, k and v: 4 numbers a token instead of 16" in text
    low, _ = all_kept([], "galore")
    less, text = all_kept(["down"], "galore")
    assert low - less == count * (4 + 16 - 6) and "down: 6 numbers a token instead of 20" in text
    low, _ = all_kept([], "gradnormlorp")
    less, text = all_kept(["down"], "gradnormlorp")
    said = " ".join(text.split())
    assert low - less == count * (4 + 16 + 16 - 6) and "instead of 20, nor 16 of its output" in said
    assert f"in all {2 * 8 * 30 / 1024:.1f} KiB a token less" in said


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@kills("optim/unit.py", "w, noise = self.w, h if self.noise else None", "w, noise = self.w, None")
@kills("optim/unit.py", "w, noise = self.w, h if self.noise else None", "w, noise = self.w, h")
@kills("optim/unit.py", "n, self.q.qs, eps, keep, noise)", "n, self.q.qs, eps, keep, None)")
def test_bf16_weights_follow_a_low_rate(rounding):
    """64 updates of a sixteenth of the distance of bf16 numbers there: 4 on average, or none."""
    block = nn.ModuleDict({"v_proj": nn.Linear(32, 64, bias=False)})
    model, x = nn.Sequential(block).bfloat16(), torch.ones(2, 32).bfloat16()
    layer = block["v_proj"]
    layer.weight.data.fill_(1.5)
    opt = attach(model, "adamw", lr=2.0**-11, velora=Velora(["v"], 4), rounding=rounding)
    with opt.observing():
        layer(x)
    for _ in range(64):
        layer(x).sum().backward()
        opt.step()
        opt.zero_grad()
    fell, sigma = (1.5 - layer.weight.float()) * 2**7, (64 * 15 / 256 / 2048) ** 0.5
    assert abs(fell.mean() - 4) < 5 * sigma if rounding == "stochastic" else not fell.any()


@pytest.mark.parametrize("method", ["adamw", "galore_8bit", "gradnormlorp_8bit", "galore_sgd"])
@kills("optim/memory.py", 'add("directions", b.m, b.qs.dtype)', 'add("directions", b.r, b.qs.dtype)')
@kills("optim/unit.py", "self.q and not self.grouped and self.store", "self.q and self.store")
def test_bytes_are_the_formulas(method):
    cfg = parse(["model=llama_1b"]).model
    with torch.device("meta"):
        model = Llama(cfg).to(torch.bfloat16)
    opt = attach(model, method, velora=Velora(["v", "down"]))
    table, counted = {}, {}
    for x in entries(opt):
        table[x.dtype] = table.get(x.dtype, 0) + x.numel
    for t in reachable(model, opt):
        counted[t.dtype] = counted.get(t.dtype, 0) + stored(t)
    assert counted == table
    assert [b.m for b in opt.grouped[:2]] == [32, 43] and max(map(len, opt.table().splitlines())) <= 80


SHAPES = ModelConfig(vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2)  # fmt: skip


@pytest.mark.parametrize("method", ["adamw", "galore", "gradnormlorp"])
@kills("llama/model.py", "F.silu(gate) * up)", "F.silu(gate) * up * (1 + 1e-9 * self.recomputed))")
@kills("llama/model.py", "if self.recomputed and", "if False and")
@kills("llama/model.py", "n >= self.model.checkpointed", "n > self.model.checkpointed")
def test_recomputing_the_input_of_down_changes_no_bit(method):
    """And drops the activated gate and its product with up: 2 i numbers a token in each of these blocks."""
    x, ends, numbers = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0)), [], []
    for down in (False, True):
        model = build_model(SHAPES, "cpu", D, 0)
        model.checkpoint_blocks(0.0, down)
        opt = attach(model, method, **keys(method))
        numbers.append(kept(model, lambda model=model: model(x, x)))
        opt.zero_grad()
        for _ in range(3):
            model(x, x).backward()
            opt.step()
            opt.zero_grad()
        ends.append(flat(model))
    assert torch.equal(*ends)
    fewer = {"adamw": 2 * 24, "galore": 24 + 20, "gradnormlorp": 24 + 20 + 16}[method]
    assert numbers[0] - numbers[1] == 2 * x.numel() * fewer
    model.checkpoint_blocks(0.5, True)
    assert [b.mlp.recomputed for b in model.model.layers] == [False, True]


# ---- refusals


@pytest.mark.parametrize(
    ("how", "method", "more", "said"),
    [
        (Velora(["w"]), "adamw", {}, r"activations.layers=\['w'\]: there is no such"),
        (Velora([]), "adamw", {}, r"activations.layers=\[\]"),
        (
            Velora(["v"], 5),
            "adamw",
            {},
            "activations.group=5: 5 does not divide the 16 inputs of v; nearest: 4 or 8, or null",
        ),
        (Velora(["v", "down"], {"v": 4, "down": 5}), "adamw", {}, "5 does not divide the 24 inputs of down"),
        (Velora(["v"], 4), "galore", {"rank": 99}, "rank=99: no matrix is wider"),
        (Velora(["v"], {"v_proj": 4}), "adamw", {}, "v_proj is not in activations.layers"),
        (Velora(["v"], 4, "running"), "adamw", {}, "activations.init=running: no such choice"),
        (Velora(["v"], 4), "galore", {"growth_limit": 1.01}, "optim.growth_limit=1.01"),
        (Velora(["q", "k", "v", "o", "gate", "up", "down"], 4), "galore", {}, "leaves no matrix to galore"),
        (Velora(["v"], 4), "odd", {}, "odd has no form for gradients"),
    ],
)
def test_what_does_not_fit_is_refused(how, method, more, said, monkeypatch):
    from optim.config import ProjectedConfig
    from optim.rules import Rule

    monkeypatch.setitem(METHODS, "odd", Method(lambda cfg: Rule(), ProjectedConfig))
    model = Tiny()
    with pytest.raises(ValueError, match=said):
        attach(model, method, velora=how, **{**keys(method), **more})
    assert {type(m) for m in model.modules()} == {type(m) for m in Tiny().modules()}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["activations.layers=w"], "activations.layers=w: not names of layers"),
        (["activations.layers=[v,v]"], "stands twice"),
        (["activations.layers=[]"], "not names of layers"),
        (["activations.group=8"], "activations.group=8: would be ignored without VeLoRA"),
        (["activations.init=svd"], "activations.init=svd: would be ignored without VeLoRA"),
        (["activations=velora", "activations.init=running"], "activations.init=running: no such choice"),
        (["activations=velora", "activations.group=0"], "activations.group=0: not a number"),
        (["activations=velora", "activations.group={q:8}"], "q is not in activations.layers"),
        (
            ["activations=velora", "activations.group=48"],
            "does not divide the 512 inputs of v; nearest: 32 or 64",
        ),
        (
            ["activations=velora", "optim=galore", "optim.growth_limit=1.01"],
            "optim.growth_limit=1.01: measures",
        ),
        (["activations.layers=[q,k,v,o,gate,up,down]", "optim=galore"], "leaves no matrix to galore"),
        (["activations.recompute=up"], "activations.recompute=up: no such choice"),
        (["activations.recompute=down", "activations.checkpoint=1"], "activations.recompute=down: would be"),
    ],
)
def test_what_does_not_fit_on_a_command_line(args, said):
    with pytest.raises(ConfigError) as caught:
        parse(args)
    (line,) = caught.value.problems
    assert said in line


@kills("configs/values.py", "known.get(head) is Any", "False")
def test_command_lines_that_fit(tmp_path):
    for text, group in (("{v:8,down:16}", {"v": 8, "down": 16}), ("8", 8)):
        cfg = parse(["activations=velora", f"activations.group={text}"]).resolved()
        assert cfg.activations.names == ["v", "down"] and cfg.activations.group == group
        (tmp_path / "config.yaml").write_text(to_yaml(cfg))
        assert from_yaml(tmp_path / "config.yaml") == cfg
    assert parse(["activations.layers=down", "activations.recompute=down"]).activations.names == ["down"]
