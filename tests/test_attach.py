"""What attach does to a model and to other people's loops: names, files, copies, moves, Trainer,
accelerate."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from configs.cli import parse
from llama.model import Llama
from optim import attach, measure
from optim.config import AdapterConfig, OptimConfig, ProjectedConfig
from optim.layer import ProjectedLinear
from optim.measure import Landed
from optim.memory import entries
from optim.methods import METHODS
from tests.mutants import kills
from tests.tiny import SETTINGS, Tiny, batches, flat, keys, run, summed_loss, train

transformers = pytest.importorskip("transformers")


def hf_llama(tied=False, seed=0, **more):
    torch.manual_seed(seed)
    shapes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    cfg = transformers.LlamaConfig(
        **shapes, num_key_value_heads=1, vocab_size=40, tie_word_embeddings=tied, **more
    )
    return transformers.LlamaForCausalLM(cfg)


def storage(model):
    """Bytes of the coordinates of a model."""
    leaves = [getattr(m, k, None) for m in model.modules() for k in ("coord", "probe", "full")]
    return sum(t.untyped_storage().nbytes() for t in leaves if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [Tiny, hf_llama], ids=["tiny", "transformers"])
@kills("optim/layer.py", "layer.weight.requires_grad_(False)", "layer.basis = nn.Parameter(torch.zeros(2))")
@kills(
    "optim/layer.py",
    "ignore[assignment]\n    layer.weight.requires_grad_(True)",
    "ignore[assignment]",
)
@kills("optim/engine.py", "self._root_hook.remove()", "pass")
def test_attach_and_detach_leave_the_model_as_it_is_invariant_45(make, method):
    model = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = [(n, p.shape, p.requires_grad, type(p)) for n, p in model.named_parameters()]
    buffers = [n for n, _ in model.named_buffers()]
    kinds = [type(m) for m in model.modules()]
    extra = [sorted(vars(m)) for m in model.modules()]
    opt = attach(model, method, **keys(method))
    assert [(n, p.shape) for n, p in model.named_parameters()] == [n[:2] for n in names]
    assert [n for n, _ in model.named_buffers()] == buffers
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    opt.detach()
    assert [(n, p.shape, p.requires_grad, type(p)) for n, p in model.named_parameters()] == names
    assert [type(m) for m in model.modules()] == kinds
    assert [sorted(vars(m)) for m in model.modules()] == extra
    assert not any(m._forward_pre_hooks for m in model.modules())
    for p in model.parameters():
        p.grad = None
    loss = summed_loss(model, batches(1)[0]) if make is Tiny else model(batches(1)[0]).logits.sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    attach(model, method, **keys(method)).detach()  # and again


@pytest.mark.parametrize("tied", [False, True])
def test_saved_with_coordinates_loads_without_unexpected_or_missing_keys(tied, tmp_path):
    model = hf_llama(tied)
    opt = attach(model, "galore", **SETTINGS)
    train_hf(model, opt, batches(4))
    model.save_pretrained(tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(flat(loaded), flat(model))


def train_hf(model, opt, tokens, scheduler=None):
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        if scheduler:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_trains_transformers_in_a_hand_written_loop(method):
    """Loss falls on one repeated batch; a torch scheduler changes the lr of all parameters."""
    model = hf_llama()
    opt = attach(model, method, **keys(method))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    losses = train_hf(model, opt, batches(1) * 8, schedule)
    assert losses[-1] < losses[0] - 0.05
    assert all(g["lr"] == pytest.approx(1e-2 / 9) for g in opt.param_groups)


@kills(
    "optim/scalars.py",
    "self.table[:, Column.LR : Column.KEEP + 1] = self.rates[self.group_of]",
    "self.table[:, Column.LR : Column.KEEP + 1] += self.rates[self.group_of] * (self.table[0, 0] == 0)",
)
def test_a_scheduler_acts_on_the_next_step():
    """lr 0 in the second step: nothing moves in it."""
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: float(step != 1))
    seen = [flat(model)]
    for tokens in batches(3):
        train(model, opt, [tokens])
        schedule.step()
        seen.append(flat(model))
    still = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert still == [False, True, False]


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=64):
        g = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(40, (6,), generator=g) for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(tmp_path, opt, model, **more):
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=6, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    return transformers.Trainer(model, args, train_dataset=Rows(), optimizers=(opt, schedule))


def test_inside_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = hf_llama()
    before = flat(model)
    opt = attach(model, "galore", **SETTINGS, accum_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, opt, model, max_grad_norm=0.0, gradient_accumulation_steps=2).train()
    assert opt.updates == 6 and not torch.equal(flat(model), before)
    assert all(b.count >= 1 for b in opt.bases)


@kills("optim/watch.py", "not torch.equal(before, grad)", "False")
def test_trainers_own_clipping_is_detected(tmp_path):
    """max_grad_norm clips only what has .grad; it is on by default, and its norm is taken even when it is
    0."""
    pytest.importorskip("accelerate")
    model = hf_llama()
    opt = attach(model, "galore", **SETTINGS)
    with pytest.warns(UserWarning, match="max_grad_norm=0 there and use optim.clip"):
        trainer(tmp_path, opt, model, max_grad_norm=0.01).train()


def test_trainer_with_another_accumulation_says_so(tmp_path):
    pytest.importorskip("accelerate")
    model = hf_llama()
    opt = attach(model, "galore", **SETTINGS)
    with pytest.raises(RuntimeError, match=r"2 backward.*accum_steps=1"):
        trainer(tmp_path, opt, model, max_grad_norm=0.0, gradient_accumulation_steps=2).train()


def test_with_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, twin = Tiny(dtype=torch.float32), Tiny(dtype=torch.float32)
    opt, other = (attach(m, "galore", **SETTINGS, accum_steps=2) for m in (model, twin))
    helper = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, wrapped = helper.prepare(model, opt)
    for tokens in batches(5):
        for part in tokens.chunk(2):
            with helper.accumulate(prepared):
                helper.backward(summed_loss(prepared, part) / 30)  # accelerate halves it
                wrapped.step()
                wrapped.zero_grad()
    train(twin, other, batches(5), micro=2)
    assert opt.updates == 5
    assert (flat(model) - flat(twin)).norm() <= 1e-4 * (flat(twin) - flat(Tiny(dtype=torch.float32))).norm()


# ---- copies and moves


@kills(
    "optim/layer.py",
    "return _plain, (state,)",
    "return super().__reduce_ex__(protocol)",
)
def test_copies_are_plain_trainable_models():
    model, opt, _ = run("galore", steps=4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert storage(copied) == 0 and not any(isinstance(m, ProjectedLinear) for m in copied.modules())
        assert torch.equal(flat(copied), flat(model))
        assert all(p.requires_grad for p in copied.parameters())
        other = attach(copied, "galore", **SETTINGS)
        train(copied, other, batches(2))
        assert not torch.equal(flat(copied), flat(model))


@kills("optim/layer.py", "        self.moved()\n        return", "        return")
def test_moved_and_converted_models_go_on_training():
    """.to(bf16) and back after attach: coordinates stay 4 bytes and follow, hooks included."""
    model = Tiny(dtype=torch.float32)
    opt = attach(model, "galore", **SETTINGS)
    train(model, opt, batches(2))
    model.to(torch.bfloat16)
    before = flat(model)
    train(model, opt, batches(3)[2:])
    assert model.layers[0].down_proj.coord.dtype == torch.bfloat16 and opt.bases[0].qs.dtype == torch.bfloat16
    assert storage(model) < 1024
    assert not torch.equal(flat(model), before) and opt.updates == 3
    model.to(torch.float64)
    train(model, opt, batches(6)[3:])
    assert storage(model) < 1024 and opt.updates == 6


def test_a_model_on_meta_becomes_real_after_attach():
    with torch.device("meta"):
        model = Tiny(dtype=torch.float32)
    opt = attach(model, "galore", **SETTINGS)
    assert storage(model) < 1024
    model.to_empty(device="cpu")
    model.load_state_dict(Tiny(dtype=torch.float32).state_dict())
    twin = Tiny(dtype=torch.float32)
    torch.manual_seed(0)
    other = attach(twin, "galore", **SETTINGS)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(5))
    assert storage(model) < 1024 and opt.updates == 5
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


# ---- tied weights, layers used twice


class Twice(nn.Module):
    """One layer used twice, and one weight in two layers."""

    def __init__(self, segments=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.layers[2].weight = self.layers[1].weight
        self.double()
        self.segments = segments

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        for layer in (self.layers[0], self.layers[1], self.layers[0], self.layers[2]):
            call = lambda x, layer=layer: torch.tanh(layer(x))  # noqa: E731
            x = call(x) if self.segments is None else checkpoint(call, x, use_reentrant=self.segments)
        return x


@pytest.mark.parametrize("segments", [None, False])
@kills("optim/assign.py", "users[id(module.weight)].append(module)", "users[id(module.weight)] = [module]")
def test_one_coordinate_a_weight(segments):
    model, plain = Twice(segments), Twice()
    opt = attach(model, "galore_sgd", lr=1e-2, scale=1.0, rank=4, refresh_every=50)
    assert len(opt.units) == 2 and model.layers[1].coord is model.layers[2].coord
    x = torch.randn(5, 16, dtype=torch.float64)
    plain(x).square().sum().backward()
    old = [u.param.detach().clone() for u in opt.units]
    model(x).square().sum().backward()
    opt.step()
    for u, w, name in zip(opt.units, old, ("0", "1"), strict=True):
        g, q = plain.layers[int(name)].weight.grad, u.q.q
        torch.testing.assert_close(u.param.data, w - 1e-2 * g @ q @ q.T, rtol=1e-11, atol=1e-13)


@kills("optim/landing.py", "if 0 < self._forwards < u.fired[n]:", "if False:")
def test_a_layer_in_two_reentrant_segments_is_refused_by_name():
    model = Twice(True)
    attach(model, "galore", lr=1e-2, rank=4)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"layers\.[01]\.weight.*use_reentrant=False"):
        model(x).square().sum().backward()


def test_tied_embedding_is_dense():
    model = hf_llama(tied=True)
    opt = attach(model, "galore", **SETTINGS)
    assert [u.role for u in opt.units if u.name == "model.embed_tokens.weight"] == ["embedding"]
    assert len(opt.units) == len(list(model.parameters()))
    train_hf(model, opt, batches(3))


# ---- who gets what


@kills("optim/refresh.py", "whole if b.side", "whole[:1] if b.side")
@kills("optim/refresh.py", "if b.due and b.arrived == len(b.units)]", "if b.due and b.arrived == 1]")
@kills("optim/assign.py", "family = family_of(u) if cfg.share", "family = u.name if cfg.share")
def test_a_shared_basis_is_that_of_the_stacked_weight_invariant_48():
    """q, k, v with one basis train as one linear layer of their rows."""

    class Split(nn.Module):
        def __init__(self, fused):
            super().__init__()
            torch.manual_seed(0)
            w = torch.randn(48, 16, dtype=torch.float64) / 4
            self.layers = nn.ModuleList([nn.Module()])
            inner = self.layers[0]
            if fused:
                inner.qkv = nn.Linear(16, 48, bias=False).double()
                inner.qkv.weight.data.copy_(w)
            else:
                for name, part in zip(("q_proj", "k_proj", "v_proj"), w.split(16), strict=True):
                    setattr(inner, name, nn.Linear(16, 16, bias=False).double())
                    getattr(inner, name).weight.data.copy_(part)

        def forward(self, x):
            inner = self.layers[0]
            return torch.cat([m(x) for m in inner.children()], -1)

    split, fused = Split(False), Split(True)
    opts = [attach(m, "galore", lr=1e-2, rank=4, refresh_every=3) for m in (split, fused)]
    assert [len(o.bases) for o in opts] == [1, 1] and opts[0].bases[0].r == 4
    g = torch.Generator().manual_seed(2)
    for _ in range(8):
        x = torch.randn(10, 16, generator=g, dtype=torch.float64)
        for m, o in zip((split, fused), opts, strict=True):
            (m(x) - x.repeat(1, 3).roll(1, 0)).square().sum().backward()
            o.step()
    torch.testing.assert_close(opts[0].bases[0].q, opts[1].bases[0].q, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flat(split), flat(fused), rtol=1e-9, atol=1e-11)


def test_sides_of_llama():
    """paper: wide matrices by their output; long: the other way round; P is never shared."""
    for side, wide, tall in (
        ("input", "q", "q"),
        ("output", "p", "p"),
        ("paper", "p", "q"),
        ("long", "q", "p"),
    ):
        opt = attach(Tiny(), "galore", **SETTINGS, side=side)
        units = {u.name.split(".")[-2]: u for u in opt.units if u.projected}
        assert [k for k in "qp" if getattr(units["down_proj"], k)] == [wide]
        assert [k for k in "qp" if getattr(units["up_proj"], k)] == [tall]
        assert all(len(b.units) == 1 for b in opt.bases if b.side == "output")
        assert (units["gate_proj"].q is units["up_proj"].q) and (
            side in ("output", "long") or units["up_proj"].q
        )
    opt = attach(Tiny(), "galore", **SETTINGS, side="both")
    assert all(u.q and u.p for u in opt.units if u.projected) and len(opt.bases) == 2 * (4 + 7)


def test_a_rank_that_saves_nothing_leaves_the_matrix_dense_and_the_table_says_so():
    opt = attach(Tiny(), "galore", lr=1e-2, rank=20)
    assert [u.name for u in opt.units if u.projected] == [f"layers.{n}.down_proj.weight" for n in (0, 1)]
    assert "none (1)" in opt.table() and "width 16" in opt.table()
    with pytest.raises(ValueError, match="rank=24.*smaller"):
        attach(Tiny(), "galore", lr=1e-2, rank=24)


@pytest.mark.parametrize(
    ("make", "method", "settings", "says"),
    [
        (Tiny, "galor", {}, "galor.*galore_8bit"),
        (Tiny, "adamw", {"rank": 4}, "rank.*unknown to adamw"),
        (Tiny, "galore", {"rank": 0}, "rank"),
        (Tiny, "galore", {"side": "left"}, "left"),
        (Tiny, "adamw", {"clip_mode": "two_pass", "clip": 1.0, "accum_steps": 2}, "two_pass.*exact"),
        (lambda: nn.Embedding(4, 4), "galore", {}, "no"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), "galore", {}, "none"),
        (Tiny, "galore", {"reduce": "sum"}, "process group"),
        (
            Tiny,
            "galore_sgd",
            {"transport": "rotate", "rank": 4},
            "transport=rotate: galore_sgd.*leave it out",
        ),
    ],
)
def test_attach_refuses_what_it_cannot_do(make, method, settings, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        attach(model, method, **settings)
    assert not any(isinstance(m, ProjectedLinear) for m in model.modules())


def test_a_second_optimizer_on_one_model_is_refused():
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS)
    with pytest.raises(ValueError, match=r"detach\(\)"):
        attach(model, "galore", **SETTINGS)
    opt.detach()
    attach(model, "galore", **SETTINGS)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_changes_after_the_first_step(method):
    model = Tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = attach(model, method, **keys(method))
    train(model, opt, batches(1))
    assert not [n for n, p in model.state_dict().items() if torch.equal(p, before[n])]


def test_an_mlp_without_numbered_blocks():
    torch.manual_seed(0)

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.down(torch.relu(self.up(x))))

    model = MLP()
    opt = attach(model, "galore", lr=1e-2, rank=4)
    roles = {u.name: u.role for u in opt.units if u.name.endswith("weight")}
    assert roles == {"up.weight": "matrix", "down.weight": "matrix", "head.weight": "head"}
    x, y = torch.randn(64, 16), torch.randint(3, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


# ---- the norm probe


@kills("optim/measure.py", "estimate = captured + rest / PROBE", "estimate = captured")
@kills("optim/measure.py", "rest / PROBE", "rest / (PROBE + 4)")
@kills("kernels/reference.py", "torch.addmm(z, r, cross, alpha=-1)", "z")
@kills("optim/unit.py", "z - self.p.q.to(r.dtype) @", "z - 0 * self.p.q.to(r.dtype) @")
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_probe_is_an_unbiased_estimate_invariant_44(side):
    """Mean over draws of S is ||G||^2, with the standard deviation of the theory; never below ||R||^2;
    linear."""
    g = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = g @ torch.diag(1 / torch.arange(1, 21, dtype=torch.float64))
    torch.manual_seed(1)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(20, 12, bias=False)])}).double()
    opt = attach(model, "galore", rank=4, side=side)
    u = opt.units[0]
    probed = u.q or u.p
    rows = g if u.q else g.T
    estimates, k = [], probed.k

    def squares(r, z):
        ((units, both),) = measure.squares([Landed("probed", u, r, z)], torch.float64)
        assert units == [u]
        return both[0]

    for draw in range(600):
        probed.draw_(7, draw)
        probed.replace_(probed.q.clone())
        r, z = u.coordinates(g), rows @ probed.s
        z = z if u.q else z.T
        captured, estimate = squares(r, z)
        assert estimate >= captured and torch.allclose(captured, r.square().sum())
        estimates.append(estimate)
    torch.testing.assert_close(squares(3 * r, 3 * z), 9 * squares(r, z))
    estimates, true = torch.stack(estimates), g.square().sum()
    inside = u.q.q @ u.q.q.T if u.q else torch.eye(20, dtype=torch.float64)
    back = g @ inside
    back = u.p.q @ u.p.q.T @ back if u.p else back
    rest = g - back
    sd = math.sqrt(2 / k) * (rest.T @ rest).norm()
    assert (estimates.mean() - true).abs() <= 4 * sd / 600**0.5
    assert 0.85 * sd <= estimates.std() <= 1.15 * sd
    plain = math.sqrt(2 / k) * (g.T @ g).norm()
    assert sd < plain  # deflation helps


# ---- memory


def reachable(*roots):
    """Every tensor that can be reached, once for each storage."""
    seen, found, queue = set(), {}, list(roots)
    while queue:
        x = queue.pop()
        if id(x) in seen or isinstance(x, (str, int, float, type, torch.dtype)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            base = x._base if x._base is not None else x
            found[id(base.untyped_storage()) if not base.is_meta else id(base)] = base
            if x.grad is not None:
                queue.append(x.grad)
        elif isinstance(x, dict):
            queue += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)):
            queue += list(x)
        elif hasattr(x, "__dict__"):
            queue += list(vars(x).values())
        if hasattr(x, "__closure__") and x.__closure__:
            queue += [c.cell_contents for c in x.__closure__]
    return list(found.values())


def stored(t):
    """Numbers in memory: one for an expanded leaf."""
    return 1 if 0 in t.stride() and t.numel() > 1 else t.numel()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((m, {}) for m in METHODS),
        ("galore_8bit", {"lift": "deferred"}),
        ("galore", {"lift": "deferred", "decay": 0.1}),
        ("gradnormlorp", {"lift": "deferred"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["9m", "60m", "130m", "350m", "1b", "7b"])
@kills(
    "optim/unit.py",
    'state["d"] = torch.ones(self.q.r, device=w.device)',
    'state["d"] = torch.ones(2 * self.q.r, device=w.device)',
)
@kills("optim/attach.py", 'p.ndim < 2 and store == "int8"', "False")
@kills("optim/memory.py", 'add("bases", len(b.qs) * b.r,', 'add("bases", len(b.qs) * b.k,')
@kills("optim/scalars.py", "torch.zeros(len(units), 2, dtype=wide", "torch.zeros(len(units), 3, dtype=wide")
@kills("optim/lift.py", "if u.mag or u.decay:", "if True:")
@kills("optim/memory.py", "len(u.w) * (u.q.r + u.q.k)", "len(u.w) * u.q.r")
def test_bytes_are_the_formulas_invariant_43(name, method, settings):
    """Every tensor of model and optimizer, by dtype, is in the table; the main terms by the papers'
    formula."""
    cfg = parse([f"model=llama_{name}"]).model
    with torch.device("meta"):
        model = Llama(cfg).to(torch.bfloat16)
    opt = attach(model, method, **settings)
    table: dict[torch.dtype, int] = {}
    for x in entries(opt):
        table[x.dtype] = table.get(x.dtype, 0) + x.numel
    counted: dict[torch.dtype, int] = {}
    for t in reachable(model, opt):
        counted[t.dtype] = counted.get(t.dtype, 0) + stored(t)
    assert counted == table
    h, i, layers, v = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.vocab_size
    rest = 2 * v * h + (2 * layers + 1) * h
    moments = sum(x.numel for x in entries(opt) if x.what == "moments")
    weights = sum(x.numel for x in entries(opt) if x.what == "weights")
    bases = sum(x.numel for x in entries(opt) if x.what == "bases")
    assert weights == layers * (4 * h * h + 3 * h * i) + rest
    kind = METHODS[method].config
    if kind is OptimConfig:
        assert (moments, bases) == (2 * weights, 0)
    elif kind is AdapterConfig:  # of I and J: P and Q, a core each; r = p
        r, sides = opt.adapters[0].r, layers * (2 * 4 * h + 3 * (h + i))  # sum of out + in
        adapters = sum(x.numel for x in entries(opt) if x.what == "adapters")
        assert adapters == sides * r + layers * (5 * h + 2 * i)
        assert bases == sides * r + 7 * layers * 2 * r * r
        assert moments == 2 * rest + 7 * layers * 4 * r * r + 2 * layers * (5 * h + 2 * i)
    else:
        r = opt.bases[0].r
        assert bases == layers * (3 * h + i) * r
        assert moments == 2 * rest + (0 if method == "galore_sgd" else 2 * layers * (5 * h + 2 * i) * r)
        beside = layers * (5 * h + 2 * i) * r if settings else 0
        assert sum(x.numel for x in entries(opt) if x.what == "deferred C") == beside
        rows = layers * (5 * h + 2 * i) if method.startswith("gradnormlorp") else 0
        for what in ("magnitudes mag, n", "moments of mag"):
            assert sum(x.numel for x in entries(opt) if x.what == what) == 2 * rows
        assert sum(x.numel for x in entries(opt) if x.what == "probe S") == layers * (3 * h + i) * 16
        assert sum(x.numel for x in entries(opt) if x.what == "probe Q^T S") == layers * 4 * r * 16


def test_static_memory_of_7b_is_17_gib():
    cfg = parse(["model=llama_7b"]).model
    with torch.device("meta"):
        model = Llama(cfg).to(torch.bfloat16)
    total = sum(x.bytes for x in entries(attach(model, "galore_8bit"))) / 2**30
    assert 17.1 < total < 17.3


@pytest.mark.parametrize("method", METHODS)
def test_the_table_names_every_parameter_in_80_columns(method):
    cfg = parse(["model=llama_7b"]).model
    with torch.device("meta"):
        model = Llama(cfg).to(torch.bfloat16)
    text = attach(model, method).table()
    assert max(map(len, text.splitlines())) <= 80, text
    for name in ("embed_tokens", "q_proj x32", "down_proj x32", "input_layernorm x32", "norm ", "lm_head"):
        assert name in text
    kind = METHODS[method].config
    assert ("input:3" in text) == issubclass(kind, ProjectedConfig)
    assert (" 1024 " in text) == (kind is not OptimConfig) and ("adapter" in text) == (kind is AdapterConfig)
    model = hf_llama()
    assert max(map(len, attach(model, method, **keys(method)).table().splitlines())) <= 80


@kills("optim/memory.py", "sum(x.bytes for x in entries(e)) < SMALL", "False")
@kills("optim/memory.py", "for x in state_of(v)) / size", "for x in state_of(v)) / 2**20")
@kills("optim/memory.py", '("MiB", 2**20) if total < SMALL', '("MiB", 2**30) if total < SMALL')
def test_the_table_of_a_small_model_counts_in_small_units():
    opt = attach(Tiny(), "galore", **SETTINGS)
    lines = opt.table().splitlines()
    trained = lines[1 : next(n for n, line in enumerate(lines) if line.startswith("held"))]
    moments = sum(x.bytes for x in entries(opt) if x.what == "moments")
    assert lines[0].endswith(" KiB")
    column = sum(float(line.split()[-1]) for line in trained if not line.startswith("("))
    assert column * 2**10 == pytest.approx(moments, abs=len(trained) * 0.05 * 2**10)
    whole = sum(x.bytes for x in entries(opt)) / 2**20
    assert f"held      {whole:.2f} MiB: weights" in opt.table()
