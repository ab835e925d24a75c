"""Matrices stored larger than they are: the same training, zeros that stay zeros, no trace of it in files."""

import copy
import io
import json
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import train as program
from configs.cli import parse
from llama import checkpoint
from llama.config import ModelConfig, flops_per_token, num_params
from llama.model import Llama, build_model, empty_model
from llama.pretrained import config_text, load_model, load_weights
from optim import attach, magnitude
from optim.config import AdapterConfig, OptimConfig, ProjectedConfig
from optim.memory import entries
from optim.methods import METHODS
from tests.mutants import kills
from tests.mutations import rehash
from tests.test_attach import reachable, stored
from tests.tiny import flat, parallel

WIDTH, HIDDEN, STORED = 32, 300, 320  # two blocks of 8-bit numbers, the second one cut


def model(pad, dtype=torch.float64, seed=0):
    cfg = ModelConfig(256, WIDTH, HIDDEN, num_hidden_layers=1, num_attention_heads=2, pad=pad)
    return build_model(cfg, "cpu", dtype, seed)


def train(m, opt, steps, first=0, rank=0, world=1):
    losses = []
    for n in range(first, first + steps):
        tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(n)).chunk(world)[rank]
        loss = m(tokens[:, :-1], tokens[:, 1:]) / 32
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def attached(m, method, settings):
    """eps as in tests.tiny.keys."""
    torch.manual_seed(0)
    basis = {} if METHODS[method].config is OptimConfig else {"rank": 6, "refresh_every": 5}
    return attach(m, method, lr=1e-2, **{"eps": 1e-6} if method != "galore_sgd" else {}, **basis, **settings)


def zeros(m, opt):
    """Everything of padding is there, and exactly zero; of magnitudes and factors what they multiply is."""
    mlp = m.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        w = layer.weight
        assert STORED in w.shape and not w[layer.out_features :].any() and not w[:, layer.in_features :].any()
    for b in opt.bases:
        assert not b.qs[b.n :].any(), b.name
    for a in opt.adapters:
        out, width = a.size
        assert not a.i[out:].any() and not a.j[:, width:].any() and (a.mag is None or not a.mag[out:].any())
    for u in opt.units:
        own = u.trim(u.state)
        for k in ("m", "v", "history"):
            if k in own and own[k].ndim > 1:
                assert not u.state[k][..., own[k].shape[-1] :].any(), (u.name, k)
        if u.deferred:
            assert not u.state["c"][u.size[0] :].any(), u.name


def same(a, b, tol):
    """Two optimizers' states: names, shapes and dtypes, and values within tol (0: bit for bit)."""
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key, x in a[name].items():
            y = b[name][key]
            assert (x.shape, x.dtype) == (y.shape, y.dtype), (name, key)
            if tol:
                x, y = x.double(), y.double()
                assert (x - y).norm() <= tol * x.norm(), (name, key)
            else:
                assert torch.equal(x, y), (name, key)


def close(a, b, start, tol):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, w in a.items():
        assert w.shape == b[name].shape
        assert (w - b[name]).norm() <= tol * (w - start[name]).norm() or torch.equal(w, b[name]), name


def sides(method):
    if issubclass(METHODS[method].config, ProjectedConfig):
        return [{"side": "input"}, {"side": "output"}]
    return [{}]


CASES = [(method, s) for method in METHODS for s in sides(method)] + [
    ("galore_8bit", {"side": "both"}),
    ("galore_8bit", {"side": "paper", "share": False}),
    ("galore", {"finder": "svd", "transport": "rotate_fill"}),
    ("galore", {"finder": "randomized", "side": "output", "transport": "rotate"}),
    ("galore", {"growth_limit": 1.01, "decay": 0.1, "clip": 0.1, "refresh": "together"}),
    ("gradnormlorp", {"side": "long", "decay": 0.1}),
    ("galore_8bit", {"lift": "deferred", "decay": 0.1}),
    ("gradnormlorp", {"lift": "deferred", "decay": 0.1}),
    ("gradnormlorp_adapter", {"normalize": False}),
    ("gradnormlorp_adapter", {"project": False, "detach_norm": True}),
]


@kills("optim/unit.py", "return w[: self.size[0]] if self.padded else w", "return w")
@kills("optim/unit.py", "grads[-1] = grads[-1][: self.size[0]]", "pass")
@kills("optim/unit.py", "self.qs = torch.zeros(rows, ", "self.qs = torch.ones(rows, ")
@kills("optim/unit.py", "(self.qs if self.side", "(self.own if self.side")
@kills("optim/refresh.py", "sums[None])[0] / u.size[0])", "sums[None])[0] / u.param.shape[0])")
@kills("optim/refresh.py", "gather_rows(u.param, g)[:, : u.size[1]]", "gather_rows(u.param, g)")
@kills("optim/magnitude.py", "left = (u.p.own.to(mag.dtype)", "left = (u.p.qs.to(mag.dtype)")
@kills("optim/magnitude.py", "            resume(u, u.w)", "            resume(u, u.param)")
@kills("optim/adapter.py", "self.squares[self.size[0] :] = 1 ", "pass ")
@kills("optim/adapter.py", "            self.mag[self.size[0] :] = 0\n", "")
@kills("optim/adapter.py", "[(u, g[: u.size[0]]) for", "[(u, g) for")
@kills("optim/adapter.py", "self.j[:, :width].copy_(drawn)", "self.j[:, -width:].copy_(drawn)")
@kills("optim/adapter.py", "bound = width**-0.5", "bound = self.j.shape[1] ** -0.5")
@kills("llama/model.py", "drawn = torch.empty(p.shape, ", "drawn = torch.empty(*p.shape[:-1], 320, ")
@pytest.mark.parametrize(("method", "settings"), CASES, ids=str)
def test_padded_is_unpadded(method, settings, monkeypatch):
    """20 steps with refreshes and merges in float64: weights, state, estimates; the first step alike."""
    monkeypatch.setattr(magnitude, "READ", 8)
    (one, a, losses), (two, b, others) = [
        (m, opt, train(m, opt, 20))
        for m in (model(False), model(True))
        for opt in [attached(m, method, settings)]
    ]
    assert losses == pytest.approx(others, rel=1e-9) and losses[0] == pytest.approx(others[0], rel=1e-14)
    assert a.bases == [] or min(x.count for x in a.bases) > 1 or METHODS[method].config is AdapterConfig
    close(one, two, model(False).state_dict(), 1e-7)
    same(a, b, 1e-5)
    for k, x in a.stats.items():
        measured = k in ("refresh_s", "saved_mib")  # bytes with padding
        assert measured or float(x) == pytest.approx(float(b.stats[k]), rel=1e-6, nan_ok=True), k
    zeros(two, b)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("adamw", {"moments": "bf16", "decay": 0.1}),
        ("galore", {"moments": "bf16", "side": "output", "decay": 0.1}),
        ("gradnormlorp_8bit", {"side": "input", "decay": 0.1}),
        ("gradnormlorp_8bit", {"side": "output", "decay": 0.1}),
        ("gradnormlorp_8bit", {"lift": "deferred", "decay": 0.1}),
        ("gradnormlorp_adapter_8bit", {"decay": 0.1}),
    ],
    ids=str,
)
def test_bf16_stochastic_rounding_and_infinity_keep_the_zeros(method, settings):
    m = model(True, torch.bfloat16)
    opt = attached(m, method, settings)
    losses = train(m, opt, 5)
    x = torch.arange(8)[None]
    (m(x, x) * float("inf")).backward()  # a refresh is due
    opt.step()
    opt.zero_grad()
    assert opt.stats["skipped"] > 0
    losses += train(m, opt, 6)
    assert max(losses) < 10
    zeros(m, opt)


@kills("optim/state.py", "**u.trim(u.state)} for u", "**u.state} for u")
@kills("optim/state.py", '{"qs": b.own,', '{"qs": b.qs,')
@kills(
    "optim/state.py",
    "in u.trim(u.state).items():\n            if key",
    "in u.state.items():\n            if key",
)
@kills("optim/state.py", "mine = {k: t for k, t in u.trim(u.state)", "mine = {k: t for k, t in (u.state)")
@kills("optim/unit.py", 'most = {"factor": self.size[0]} | ', "most = ")
@kills("optim/adapter.py", "local(self.weight)[:out, :width]", "local(self.weight)")
@kills("optim/adapter.py", 'self.i[:out], "j": self.j[:, :width]', 'self.i, "j": self.j')
@kills("optim/adapter.py", '{"mag": self.mag[:out]}', '{"mag": self.mag}')
@kills("llama/model.py", "self.register_state_dict_post_hook(_without_padding)", "pass")
@kills("llama/model.py", "self.register_load_state_dict_pre_hook(_with_padding)", "pass")
@kills("optim/unit.py", "rows = {k: state[k][: self.size[0]] for", "rows = {k: state[k] for")
@kills("optim/state.py", "u.w[:, : u.size[1]].detach()", "u.w.detach()")
@kills(
    "llama/checkpoint.py",
    "if any(True for child in module.children() for _ in child.children()):",
    "if any(module.children()):",
)
@pytest.mark.parametrize("saved_padded", [True, False])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((m, sides(m)[-1]) for m in METHODS),
        ("galore", {"lift": "deferred"}),
        ("gradnormlorp_8bit", {"lift": "deferred", "decay": 0.1}),
    ],
    ids=str,
)
def test_a_state_goes_on_padded_or_not(method, settings, saved_padded):
    """Saved after 7 of 11 steps: what is read back is what was saved; bitwise if padded alike, else equal."""
    one = model(saved_padded)
    opt = attached(one, method, settings)
    start = copy.deepcopy(one.state_dict())
    train(one, opt, 7)
    frugal = checkpoint.weights(one)
    assert all(torch.equal(frugal.pop(name), w) for name, w in one.state_dict().items()) and not frugal
    buffer = io.BytesIO()
    torch.save([one.state_dict(), opt.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (WIDTH, HIDDEN)
    others = []
    for pad in (saved_padded, not saved_padded):
        m = model(pad, seed=5)
        other = attached(m, method, settings)
        m.load_state_dict(weights)
        other.load_state_dict(state)
        same(opt, other, 0)
        others.append((m, other))
    train(one, opt, 4, first=7)
    for (m, other), tol in zip(others, (0, 1e-7), strict=True):
        train(m, other, 4, first=7)
        close(one, m, start, tol)
        same(opt, other, 100 * tol)
    zeros(*others[saved_padded is False])


@kills("optim/state.py", "x = F.pad(x, (0, u.state[k].shape[-1] - x.shape[-1])) if x.ndim else x", "pass")
@kills("optim/state.py", "return u.trim(u.rule.begin(", "return (u.rule.begin(")
@pytest.mark.parametrize("side", ["input", "output"])
def test_moments_in_another_store(side):
    """A padded save of galore_8bit goes on as galore: with the moments, and d, of the unpadded one."""
    opts = []
    for pad in (False, True):
        m = model(pad)
        opt = attached(m, "galore_8bit", {"side": side})
        train(m, opt, 5)
        opts.append([attached(model(pad), method, {"side": side}) for method in ("galore", "galore_8bit")])
        opts[-1][0].load_state_dict(opt.state_dict())
        opts[-1][1].load_state_dict(opts[-1][0].state_dict())
    for a, b in zip(*opts, strict=True):
        same(a, b, 1e-5)


@kills("llama/model.py", "            nn.init.zeros_(module.weight)\n", "            pass\n")
@kills("llama/pretrained.py", "wanted = model.weights()", "wanted = dict(model.named_parameters())")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_those_of_the_unpadded_model(tmp_path, dtype):
    """The same bytes on disk; read back into fresh memory, which holds anything, with zeros as padding."""
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    try:
        for name, pad in (("one", False), ("two", True)):
            m = model(pad, dtype)
            assert bool(pad) == (m.model.layers[0].mlp.up_proj.weight.shape[0] == STORED)
            texts = {"config.json": config_text(m.cfg, dtype=dtype), checkpoint.STATE: "{}"}
            checkpoint.write(tmp_path / name, 1, {"model.safetensors": m.state_dict()}, texts, keep_last=1)
        one, two = (checkpoint.folder(tmp_path / name, 1) for name in ("one", "two"))
        for file in ("model.safetensors", "config.json"):
            assert (one / file).read_bytes() == (two / file).read_bytes()
        again = empty_model(m.cfg, "cpu", dtype)
        load_weights(again, two)
        for padded in (m, again):
            zeros(padded, attach(padded, "adamw"))
            tokens = torch.arange(8)[None]
            torch.testing.assert_close(padded(tokens), load_model(one, "cpu")(tokens))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def began(command, tmp_path_factory):
    """A padded run of 6 steps with saves of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("began")
    assert program.main(line(command, folder)) == 0
    return folder


def line(command, folder, *changes):
    args = (
        "model.intermediate_size=60",
        "model.pad=true",
        "optim=galore",
        "optim.rank=8",
        "optim.side=output",
    )
    return command(folder, *args, "optim.refresh_every=3", "save_every=3", *changes)


@kills("llama/pretrained.py", 'if key not in ("init_from", "pad") and', 'if key not in ("init_from",) and')
@kills("configs/resume.py", '    "model.pad",\n', "")
@pytest.mark.parametrize(
    ("change", "before", "said"),
    [
        ("model.pad=true", True, ""),
        ("model.pad=false", True, "changed   model.pad=False: was True"),
        ("model.pad=true", None, "changed   model.pad=True: was None"),  # a save from before there was a key
    ],
)
def test_a_run_goes_on_padded_or_not(began, command, tmp_path, capfd, change, before, said):
    """The same bits where nothing changed; the logical shapes in every file."""
    shutil.copytree(began, tmp_path, dirs_exist_ok=True)
    newest = checkpoint.folder(tmp_path / "r", 6)
    whole = {name: load_file(newest / name) for name in ("model.safetensors", "optim.safetensors")}
    shutil.rmtree(newest)
    if before is None:
        save = checkpoint.folder(tmp_path / "r", 3)
        state = json.loads((save / checkpoint.STATE).read_text())
        del state["config"]["model"]["pad"]
        (save / checkpoint.STATE).write_text(json.dumps(state))
        rehash(save)
    assert program.main(line(command, tmp_path, change)) == 0
    told = capfd.readouterr().err
    assert "going on from step 3" in told and said in told and ("model.pad" in told) == bool(said)
    assert "60x32" in told and "64x32" not in told
    for name, tensors in whole.items():
        for key, x in load_file(newest / name).items():
            assert 64 not in x.shape
            if change == "model.pad=true":
                assert torch.equal(x, tensors[key]), key
            else:
                torch.testing.assert_close(x, tensors[key], rtol=1e-3, atol=1e-5)


@kills("train.py", "init_from=cfg.model.init_from, pad=cfg.model.pad)", "init_from=cfg.model.init_from)")
def test_a_folder_is_padded_as_asked(began, command, tmp_path):
    source = checkpoint.latest(began / "r")
    args = [
        a for a in line(command, tmp_path, "steps=1") if not a.startswith("model") or a == "model.pad=true"
    ]
    assert (
        program.main([*args, f"model.init_from={source}", f"data.tokenizer={began}/r/tokenizer.model"]) == 0
    )
    assert "  pad: true\n" in (tmp_path / "r" / "config.yaml").read_text()


RANKS = [("galore_8bit", {"side": "paper"}), ("gradnormlorp_adapter", {}), ("adamw", {})]


def on_rank(rank, world):
    ends = []
    for method, settings in RANKS:
        m = model(True)
        train(
            m,
            attached(m, method, {**settings, "group": dist.group.WORLD, "reduce": "sum"}),
            6,
            0,
            rank,
            world,
        )
        ends.append(flat(m))
    m = model(True)
    for block in m.model.layers:
        fully_shard(block)
    with pytest.raises(
        ValueError, match=r"sharded and padded; build the model without padding \(model.pad=false"
    ):
        attached(m, "galore", {"group": dist.group.WORLD, "reduce": "sum"})
    return ends


@kills("optim/attach.py", "    if sharded(p):\n", "    if False:\n")
def test_ranks_equal_one_and_shards_are_refused():
    one, two = parallel(2, on_rank)
    for (method, settings), a, b in zip(RANKS, one, two, strict=True):
        m = model(True)
        opt = attached(m, method, settings)
        train(m, opt, 6)
        assert torch.equal(a, b)
        assert (a - flat(m)).norm() <= 1e-8 * (flat(m) - flat(model(True))).norm()
        zeros(m, opt)


@kills("optim/assign.py", "default_rank(sum(math.prod(u.size)", "default_rank(sum(u.param.numel()")
@kills("optim/attach.py", "sum(math.prod(u.size) for u in units)", "sum(u.param.numel() for u in units)")
@kills("optim/memory.py", 'add("bases", len(b.qs) * b.r,', 'add("bases", b.n * b.r,')
@kills("optim/memory.py", 'Entry("row factors", len(u.param), wide)', 'Entry("row factors", rows, wide)')
@kills("optim/memory.py", "(a or u).size), [])", "(a.weight if a else u.param).shape), [])")
def test_counts_are_of_the_size_that_was_asked_for():
    """1B: parameters, operations, rank, lr and table by 5461; bytes by what is stored."""
    cfg = parse(["model=llama_1b", "model.pad=true"]).model
    plain = parse(["model=llama_1b"]).model
    assert num_params(cfg) == num_params(plain) and flops_per_token(cfg, 256) == flops_per_token(plain, 256)
    for method, more in (("galore", {}), ("gradnormlorp", {"side": "output"}), ("gradnormlorp_adapter", {})):
        with torch.device("meta"):
            m = Llama(cfg).to(torch.bfloat16)
        assert (
            sum(w.numel() for w in m.weights().values())
            == num_params(cfg)
            < sum(p.numel() for p in m.parameters())
        )
        opt = attach(m, method, **more)
        rank = opt.adapters[0].r if opt.adapters else opt.bases[0].r
        assert rank == 512 and "5461" in opt.table() and "5504" not in opt.table()
        assert sum(map(stored, reachable(m, opt))) == sum(x.numel for x in entries(opt))
    cfg = ModelConfig(256, 416, 1979, 8, 8, pad=True)  # just small enough for a rank that is not rounded
    with torch.device("meta"):
        assert attach(Llama(cfg), "galore").bases[0].r == 104
    cfg = ModelConfig(19_000, 2048, 5461, 16, 32, pad=True)  # just below the next lr
    cfg.vocab_size += (10**9 - num_params(cfg)) // (2 * 2048)
    with torch.device("meta"):
        m = Llama(cfg)
    assert num_params(cfg) < 10**9 < sum(p.numel() for p in m.parameters())
    assert attach(m, "adamw").param_groups[0]["lr"] == 1e-3


@kills("optim/attach.py", "if not p.is_meta and (p[size[0] :].any() or p[:, size[1] :].any()):", "if False:")
def test_what_is_beyond_a_layers_size_must_be_zero():
    for at in ((299, 0), (0, 49)):
        layer = nn.Linear(40, 290, bias=False)
        layer.weight = nn.Parameter(torch.zeros(300, 50))
        attach(nn.Sequential(layer), "adamw")
        with torch.no_grad():
            layer.weight[at] = 1
        with pytest.raises(ValueError, match=r"0.weight: stored as \(300, 50\) in a layer of \(290, 40\)"):
            attach(nn.Sequential(layer), "adamw")


@kills("optim/unit.py", "-(-width // kernels.QUANT) for k", "99 for k")
@kills("optim/assign.py", "    out, width = u.size\n", "    out, width = u.param.shape\n")
def test_padding_of_any_size():
    """Columns that add a block of 8-bit numbers; rows that make a wide matrix a high one. Of integers
    every product is exact, so that no sum's order moves a code."""
    layers = [nn.Linear(250, 240, bias=False) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    layers[0].weight.data = torch.randint(-3, 4, (240, 250), generator=g).float()
    layers[1].weight = nn.Parameter(torch.nn.functional.pad(layers[0].weight.detach(), (0, 50, 0, 70)))
    states = []
    for layer, more in zip(layers, (0, 50), strict=True):
        opt = attach(layer, "adamw_8bit", lr=1e-2)
        x = torch.randint(-3, 4, (9, 250), generator=g.manual_seed(1)).float()
        layer(nn.functional.pad(x, (0, more)))[:, :240].square().sum().backward()
        opt.step()
        states.append(opt)
        both = nn.ModuleList([nn.ModuleDict({"q_proj": layer})])
        opt.detach()
        sides = attach(both, "galore", side="paper", rank=8)
        assert [b.side for b in sides.bases] == ["output"]
        sides.detach()
    same(*states, 1e-6)


@pytest.mark.parametrize("method", ["gradnormlorp", "gradnormlorp_adapter"])
def test_copies_and_pickles_are_padded_too(method):
    m = model(True)
    opt = attached(m, method, {})
    train(m, opt, 3)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        close(m, other, model(True).state_dict(), 0)
        zeros(other, attach(other, "adamw"))
    before = copy.deepcopy(m.state_dict())
    opt.detach()
    assert all(torch.equal(w, before[k]) for k, w in m.state_dict().items())
