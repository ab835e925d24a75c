"""A small model, a training loop and a dense oracle, shared by the optimizer's tests."""

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from optim import attach, subspace
from optim.config import AdapterConfig, AdaRankConfig
from optim.refresh import due

VOCAB, WIDTH, HIDDEN = 40, 16, 24
SETTINGS = {"lr": 1e-2, "rank": 4, "refresh_every": 3}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.o_proj = nn.Linear(WIDTH, WIDTH)  # with a bias
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.o_proj(torch.tanh(self.q_proj(y)) * self.k_proj(y) + self.v_proj(y))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Tiny(nn.Module):
    def __init__(self, blocks=2, dtype=torch.float64, seed=0, checkpointing=None):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.checkpointing = checkpointing  # None, or use_reentrant
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.layers:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(x)


def batches(steps, seed=1, rows=12):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (rows, 6), generator=g) for _ in range(steps)]


def summed_loss(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def train(model, opt, tokens, micro=1, rank=0, world=1, after_step=None):
    """Steps over `tokens`, each rank its own rows, the loss divided by all tokens; losses of the steps."""
    losses = []
    for n, batch in enumerate(tokens):
        total = 0.0
        for _ in range(getattr(opt, "passes", 1)):
            total = 0.0
            for part in batch.chunk(world)[rank].chunk(micro):
                loss = summed_loss(model, part) / (5 * len(batch))
                loss.backward()
                total += float(loss.detach())
        opt.step()
        opt.zero_grad()
        losses.append(total)
        if after_step:
            after_step(n)
    return losses


def compile_blocks(model, **settings):
    fast = torch.compile(type(model.layers[0]).forward, fullgraph=True, **settings)
    for block in model.layers:
        block.forward = MethodType(fast, block)


def flat(model):
    """Its weights as they would be saved: an adapted layer's is not its parameter."""
    state = model.state_dict()
    whole = [state[name].detach() for name, _ in model.named_parameters()]
    return torch.cat([(w.full_tensor() if isinstance(w, DTensor) else w).flatten() for w in whole])


def moved(model, start):
    """How far two trained models lie apart is judged by how far they moved."""
    return (flat(model) - start).norm()


def run(method, steps=6, micro=1, model=None, compiled=False, seed=1, **settings):
    """A trained Tiny, its optimizer and losses."""
    model = Tiny() if model is None else model
    opt = attach(model, method, accum_steps=micro, **{**keys(method), **settings})
    if compiled:
        compile_blocks(model)
    return model, opt, train(model, opt, batches(steps, seed), micro)


def keys(method):
    """SETTINGS, but for methods without a basis the lr alone, and ranks that change for adarankgrad.

    A factor's gradient between bases found from it is near diagonal: with eps=1e-8 Adam makes steps of what
    is rounding beside the diagonal."""
    from optim.methods import METHODS

    kind = METHODS[method].config
    known = {k: v for k, v in SETTINGS.items() if k in kind.__dataclass_fields__}
    return known | (
        {"eps": 1e-6} if kind is AdapterConfig else {"energy": 0.6} if kind is AdaRankConfig else {}
    )


def shard(model, world):
    """Cuts a Tiny by rows among the ranks (FSDP2); their group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return mesh.get_group()


def everything(model, opt, seen):
    """Weights and state by name; of each step's loss and statistics what is a number and no time."""
    state = opt.state_dict()["state"]
    tensors = {f"{name} {k}": t for name, own in state.items() for k, t in own.items()}
    values = [{k: float(v) for k, v in s.items() if k != "refresh_s" and v == v} for s in seen]
    return {**model.state_dict(), **tensors}, values


def parallel(world, work, *args):
    """[work(rank, world, *args) of each rank] in as many gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        ranks = [
            context.Process(target=_enter, args=(folder, rank, world, work, args)) for rank in range(world)
        ]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(120)
        codes = [p.exitcode for p in ranks]
        for p in ranks:
            p.kill()
        assert codes == [0] * world, codes
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def ranks(world, method, steps, micro, settings):
    """Weights of Tiny on each of `world` replicas, trained on `steps` batches together."""
    return parallel(world, _replica, method, steps, micro, settings)


def _replica(rank, world, method, steps, micro, settings):
    model, group = Tiny(), dist.group.WORLD
    opt = attach(model, method, accum_steps=micro, group=group, reduce="sum", **settings)
    train(model, opt, batches(steps), micro, rank=rank, world=world)
    return flat(model)


def _enter(folder, rank, world, work, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world, *args), Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()


class Oracle:
    """The gradient-then-project form of low-rank Adam or SGD: plain autograd, whole gradients, one process.

    Follows an engine's units, bases (their first, random values) and schedule; everything else is its own.
    """

    def __init__(self, model, engine, beta1=0.9, beta2=0.999, eps=1e-8, adam=True, transport=None):
        self.model, self.engine, self.adam, self.transport = model, engine, adam, transport
        self.betas, self.eps = (beta1, beta2), eps
        self.q = {b.name: b.q.clone() for b in engine.bases}
        self.found = {b.name: 0 for b in engine.bases}
        self.state = {u.name: [0.0, 0.0, 0] for u in engine.units}
        self.named = dict(model.named_parameters())
        self.step_number = 0
        self.g = {}

    def back(self, u, n):
        p, q = (self.q[b.name] if b else None for b in (u.p, u.q))
        n = n @ q.T if q is not None else n
        return p @ n if p is not None else n

    def project(self, u, g):
        p, q = (self.q[b.name] if b else None for b in (u.p, u.q))
        g = g @ q if q is not None else g
        return p.T @ g if p is not None else g

    def ranks(self, b):
        """How the rank of the basis after b is chosen: not."""

    def due(self, b):
        e = self.engine
        return due(b.turn, e.turns, self.step_number, e.every, 0, e.cfg.refresh == "together")

    def refresh(self, b):
        gs = [self.named[u.name].grad if b.side == "input" else self.named[u.name].grad.T for u in b.units]
        old, cfg = self.q[b.name], self.engine.cfg
        seed = subspace.mix(self.engine.seed, b.index, self.found[b.name], 2)
        found = subspace.find(gs, old, cfg.finder, seed, self.found[b.name] == 0, self.ranks(b))
        policy = cfg.transport
        if policy == "auto":
            first = self.found[b.name] == 0
            rotated = "rotate_fill" if getattr(cfg, "adapt_rank", False) else "rotate"
            policy = "reset" if first else "keep" if cfg.finder == "warm" else rotated
        c = old.T @ found.q
        if policy == "keep" and getattr(cfg, "adapt_rank", False):
            policy, c = "rotate_fill", torch.eye(*c.shape, dtype=c.dtype)
        self.q[b.name] = found.q
        self.found[b.name] += 1
        for u in b.units:
            m, v, t = self.state[u.name]
            if policy == "reset":
                self.state[u.name] = [0.0, 0.0, 0]
            elif policy != "keep" and self.adam:
                right = b.side == "input"
                m = m @ c if right else c.T @ m
                share = c**2
                if right:
                    fill = v.mean(1, keepdim=True) * (1 - share.sum(0))
                    v = v @ share
                else:
                    fill = v.mean(0) * (1 - share.sum(0))[:, None]
                    v = share.T @ v
                self.state[u.name] = [m, v + fill if policy == "rotate_fill" else v, t]

    @torch.no_grad()
    def step(self):
        e = self.engine
        for b in e.bases:
            if self.due(b):
                self.refresh(b)
        for u in e.units:
            w, lr = self.named[u.name], e.cfg.lr * u.scale
            g = self.project(u, w.grad)
            if self.adam or not u.projected:
                m, v, t = self.state[u.name]
                m = self.betas[0] * m + (1 - self.betas[0]) * g
                v = self.betas[1] * v + (1 - self.betas[1]) * g**2
                self.state[u.name] = [m, v, t + 1]
                fix1, fix2 = (-math.expm1((t + 1) * math.log(b)) for b in self.betas)
                g = (m / fix1) / ((v / fix2).sqrt() + self.eps)
            w.sub_(lr * self.back(u, g) + e.cfg.lr * u.decay * w)
        self.step_number += 1

    def zero_grad(self):
        for p in self.model.parameters():
            p.grad = None


def state_text(shapes, step: int, seq_len: int) -> str:
    """state.json of a save before any token, of a model with these shapes."""
    config = {"model": asdict(shapes), "seq_len": seq_len}
    return json.dumps({"step": step, "data": None, "stream": "", "tokens": 0, "config": config})
