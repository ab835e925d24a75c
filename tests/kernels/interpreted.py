"""The kernels' source on CPU tensors against their references; a process of test_kernels.py.

Needs TRITON_INTERPRET=1. Prints one line a case: dtypes and the largest differences.
"""

import itertools
import sys

import torch

import kernels.natural as natural_module
import kernels.norms as norms_module
from kernels import (
    adam_,
    adam_direction,
    adam_parts,
    cross_entropy_,
    grouped_,
    magnitude_,
    natural_direction_,
    natural_dots_,
    natural_weights_,
    plan,
    probe_squares,
    rescale_,
    rows_,
    save_,
    squares,
    tangent_,
)
from kernels.adam import DIRECTION_VARIANTS, PARTS_VARIANTS, VARIANTS
from kernels.grouped import VARIANTS as GROUPED_VARIANTS
from kernels.natural import VARIANTS as NATURAL_VARIANTS
from kernels.reference import Column
from optim import moments

BETAS = (0.9, 0.999, 1e-8)
DENSE = [(1,), (7,), (127,), (2049,), (6000,), (33, 9), (3, 683), (4, 300), (9, 512), (17, 256), (5, 2, 40)]
SKIPPED = (1, 7, 8)  # of DENSE: OK = 0
PROJECTED = [(1, 1), (7, 33), (33, 128), (16, 128), (5, 300), (8, 300), (3, 1024), (8, 512), (9, 256)]
STORES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
GUARD = 64  # numbers behind every tensor that a kernel writes
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)

# few programs, of milliseconds each; the largest of `norms` takes more than the others
norms_module.LARGE, norms_module.MANY, norms_module.PARTS = 1100 * 256, 10, 8
natural_module.PARTS, natural_module.SOLVE = 3, 8
torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
assert torch.empty(3).isnan().all()


def guarded(t):
    """A copy of t with 77 in the memory behind it."""
    buffer = torch.full((t.numel() + GUARD,), 77, dtype=t.dtype)
    view = buffer[: t.numel()].view(t.shape)
    view.copy_(t)
    return view


def intact(t):
    return (t.untyped_storage().nbytes() // t.element_size() == t.numel() + GUARD) and bool(
        (t.new_empty(0).set_(t.untyped_storage(), t.numel(), (GUARD,)) == 77).all()
    )


def random_state(shape, moment, g, scaled=False):
    """Moments as training leaves them, of columns that differ much; one row of zeros."""
    state = moments.init(STORES[moment], shape, "cpu", torch.float32)
    size = torch.arange(1, shape[-1] + 1) ** -1.0
    if scaled:
        state["d"] = size * 1.3
    m, v = torch.randn(shape, generator=g) * size, torch.randn(shape, generator=g).square() * size.square()
    v[-1] = v[-1] * (torch.arange(v[-1].numel()) % 3 > 0).view(v[-1].shape)  # zeros among others
    for name, value in (("m", m), ("v", v)):
        save_(state, name, value, ONE, ONE, ZERO)
    return {name: guarded(t) for name, t in state.items()}


def table_of(n):
    table = torch.zeros(n, 8)
    table[:, Column.LR] = torch.linspace(1e-3, 1e-1, n)
    table[:, Column.KEEP] = 0.99
    table[:, Column.CLIP] = 0.7
    table[:, Column.OK] = 1
    table[:, Column.T] = 3
    table[:, Column.INDEX] = torch.arange(n)
    table[:, Column.FIX1], table[:, Column.FIX2] = 0.271, 0.002997
    return table


def ulps(a, b, before):
    """Largest difference in units of the last place of the larger of old and new value.

    Where an update nearly cancels a weight, the rounding of the old one is all that is left. NaN counts as
    infinitely far.
    """
    bits = 7 if b.dtype == torch.bfloat16 else 23
    size = torch.maximum(b.double().abs(), before.double().abs()).clamp(min=1e-30)
    unit = 2.0 ** (torch.floor(torch.log2(size)) - bits)
    return ((a.double() - b.double()).abs() / unit).nan_to_num(float("inf")).max().item()


def allowed(dtype):
    """Units. bf16: the interpreter truncates fp32 where hardware rounds to nearest, one; v is rounded by its
    own random bits and must agree but for an fp32 last place: one too. fp32: eight roundings on the way, in
    another order. Codes: one, at ties.
    """
    return 1.0 if dtype in (torch.bfloat16, torch.int8, torch.uint8) else 8.0


class Worst(dict):
    """name -> largest difference, in ulps or codes; and how many codes and random roundings differ."""

    ok, differ, count = True, 0, 0

    def compare(self, name, a, b, before):
        codes = b.dtype in (torch.int8, torch.uint8)
        off = (a.int() - b.int()).abs().max().item() if codes else ulps(a, b, before)
        self[name] = max(self.get(name, 0), off)
        self.ok &= off <= allowed(b.dtype) and intact(a)
        if codes or name in ("v", "noisy") and b.dtype == torch.bfloat16:
            self.differ += int((a != b).sum())
            self.count += b.numel()

    def verdict(self):
        self["differ"] = f"{self.differ} of {self.count}"
        return self.ok and self.differ <= 1e-3 * self.count


def copies(states):
    return [{name: guarded(t) for name, t in s.items()} for s in states]


def report(ok, *what):
    """One line; the first case that fails is the last."""
    print("ok " if ok else "BAD", *what)
    if not ok:
        sys.exit(1)


def dense(kinds, seed, noise):
    """All of DENSE in one call, the kinds (weights, moments) in turn. A moment that is the hardware's NaN
    makes a NaN, however that is rounded."""
    g = torch.Generator().manual_seed(seed)
    kind = [kinds[n % len(kinds)] for n in range(len(DENSE))]
    ws = [guarded(torch.randn(s, generator=g).to(k[0])) for s, k in zip(DENSE, kind, strict=True)]
    gs = [torch.randn(s, generator=g).to(k[0]) for s, k in zip(DENSE, kind, strict=True)]
    states = [random_state(s, k[1], g) for s, k in zip(DENSE, kind, strict=True)]
    table = table_of(len(DENSE))
    table[list(SKIPPED), Column.OK] = 0
    for n in SKIPPED:
        gs[n].view(-1)[-1] = float("nan")
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    broken = [n for n, s in enumerate(states) if n not in SKIPPED and s["m"].dtype == torch.float32][-1:]
    for n in broken:
        states[n]["m"].view(-1)[-1] = nan
    before = [w.clone() for w in ws], copies(states)
    ref = [w.clone() for w in ws], copies(states)
    adam_(ws, gs, states, table, plan(ws, states), *BETAS, noise, impl="triton")
    adam_(ref[0], gs, ref[1], table, None, *BETAS, noise, impl="ref")
    worst, ok = Worst(), True
    for n in broken:
        for t in (ws[n], ref[0][n], states[n]["m"], ref[1][n]["m"]):
            ok &= t.isnan().sum().item() == 1 and bool(t.view(-1)[-1].isnan())
            t.view(-1)[-1] = 0
        before[1][n]["m"].view(-1)[-1] = 0
    for n, w in enumerate(ws):
        worst.compare("noisy" if noise else "w", w, ref[0][n], before[0][n])
        ok &= torch.equal(w, before[0][n]) == (n in SKIPPED)
        for name, t in states[n].items():
            worst.compare(name, t, ref[1][n][name], before[1][n][name])
            ok &= n not in SKIPPED or torch.equal(t, before[1][n][name])
    report(worst.verdict() and ok, "adam", kinds, "stochastic" if noise else "", dict(worst))


def direction(grad, out, moment, scaled):
    """PROJECTED, every other one contiguous or with rows apart, between NaNs; then once more with OK = 0."""
    worst, ok, g = Worst(), True, torch.Generator().manual_seed(0)
    for number, shape in enumerate(PROJECTED):
        gap = 0 if number % 2 else 5
        x = torch.full((shape[0], shape[1] + gap), float("nan")).to(grad)
        x[:, : shape[1]] = torch.randn(shape, generator=g) / torch.arange(1, shape[1] + 1)
        x = x[:, : shape[1]]
        h, state = table_of(1)[0], random_state(shape, moment, g, scaled)
        before, ref = copies([state])[0], copies([state])[0]
        n = adam_direction(x, state, h, *BETAS, out, impl="triton")
        want = adam_direction(x, ref, h, *BETAS, out, impl="ref")
        ok &= n.dtype == out and n.is_contiguous() and n.abs().max().item() > 0
        worst.compare("n", guarded(n), want, want)
        for name, t in state.items():
            worst.compare(name, t, ref[name], before[name])
        x[0, 0], h[Column.OK] = float("nan"), 0
        kept = copies([state])[0]
        n = adam_direction(x, state, h, *BETAS, out, impl="triton")
        ok &= torch.equal(n, torch.zeros(shape, dtype=out))
        ok &= all(torch.equal(t, kept[name]) for name, t in state.items())
    report(worst.verdict() and ok, "direction", grad, out, moment, "scaled" if scaled else "", dict(worst))


def parts(grad, moment):
    """Both parts of directions; and nothing where OK = 0."""
    worst, ok, g = Worst(), True, torch.Generator().manual_seed(0)
    for shape in PROJECTED:
        x = torch.full((shape[0], shape[1] + 5), float("nan")).to(grad)[:, : shape[1]]
        x.copy_(torch.randn(shape, generator=g))
        h, state = table_of(1)[0], random_state(shape, moment, g)
        before, ref = copies([state])[0], copies([state])[0]
        n = adam_parts(x, state, h, *BETAS[:2], impl="triton")
        want = adam_parts(x, ref, h, *BETAS[:2], impl="ref")
        ok &= n.shape == want.shape and n[0].abs().max().item() > 0 and n[1].min().item() >= 0
        worst.compare("n", guarded(n), want, want)
        for name, t in state.items():
            worst.compare(name, t, ref[name], before[name])
        x[0, 0], h[Column.OK] = float("nan"), 0
        ok &= torch.equal(adam_parts(x, state, h, *BETAS[:2], impl="triton"), torch.zeros_like(want))
    report(worst.verdict() and ok, "parts", grad, moment, dict(worst))


def grouped(weight, direction, noise):
    """Rows and groups that no tile divides, with and without decay; parts of zeros change nothing."""
    h = table_of(3)[2] if noise else None
    worst, ok, g = Worst(), True, torch.Generator().manual_seed(0)
    for rows, groups, size in ((1, 1, 1), (7, 3, 8), (33, 8, 43), (5, 64, 32)):
        whole = guarded(torch.randn(rows, groups * size + size % 2, generator=g).to(weight))
        w, last = whole[:, : groups * size], whole[:, groups * size :].clone()  # beside columns of padding
        d = torch.nn.functional.normalize(torch.randn(size, generator=g), dim=0).to(direction)
        both = torch.randn(2, rows, groups, generator=g)
        both[0] /= 100
        both[1].abs_()
        for keep in (None, torch.tensor(0.99)):
            before, ref = w.clone(), w.clone()
            grouped_(w, both, d, 0.3, keep, h, impl="triton")
            grouped_(ref, both, d, 0.3, keep, h, impl="ref")
            worst.compare("noisy" if noise else "w", guarded(w), ref, before)
            w.copy_(ref)
        ok &= intact(whole) and torch.equal(whole[:, groups * size :], last)
        before = w.clone()
        grouped_(w, torch.zeros_like(both), d, 1e-8, None, h, impl="triton")
        ok &= torch.equal(w, before)
    report(worst.verdict() and ok, "grouped", weight, direction, "stochastic" if noise else "", dict(worst))


def norms(dtype, aligned):
    """Tensors as they come, columns of wider ones between NaNs, empty ones: one launch for all. The largest
    takes more programs than the others."""
    g = torch.Generator().manual_seed(0)
    gap = 8 if aligned else 3
    shapes = [(8, 16), (33, 128), (1100, 256), (520, 256), (3, 1024), (0, 8)] + (
        [] if aligned else [(), (7,), (5, 300)]
    )
    ts = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    for shape in ((9, 264), (300, 16), (0, 8)):
        wide = torch.full((shape[0], shape[1] + gap), float("nan")).to(dtype)
        wide[:, : shape[1]] = torch.randn(shape, generator=g)
        ts.append(wide[:, : shape[1]])
    got = squares(ts, torch.float32, impl="triton")
    want = squares([t.double() for t in ts], torch.float64, impl="ref")
    off = ((got - want).abs() / want.clamp(min=1e-30)).max().item()
    bad = [ts[1].index_fill(0, torch.tensor(32), value) for value in (float("nan"), float("inf"))]
    wrong = squares(bad, torch.float32, impl="triton")
    ok = off <= 1e-6 and bool(wrong[0].isnan() and wrong[1].isinf())
    # whatever is beside it in a launch, a tensor's sum has the same bits
    ok &= all(
        torch.equal(squares([t], torch.float32, impl="triton")[0], x) for t, x in zip(ts, got, strict=True)
    )
    report(ok, "squares", dtype, "aligned" if aligned else "", off)


def probed(dtype, aligned):
    """[R, Z] between NaNs, of more rows than one program takes, of none, of ranks that no tile divides."""
    g = torch.Generator().manual_seed(0)
    shapes = [(33, 128), (70, 264), (600, 8), (0, 16), *([] if aligned else [(5, 3), (9, 300)])]
    rs, zs, crosses = [], [], []
    for rows, rank in shapes:
        wide = torch.full((rows, rank + 24 if aligned else rank + 19), float("nan")).to(dtype)
        wide[:, : rank + 16] = torch.randn(rows, rank + 16, generator=g)
        rs.append(wide[:, :rank])
        zs.append(wide[:, rank : rank + 16])
        crosses.append((torch.randn(rank, 16, generator=g) / rank**0.5).to(dtype))
    got = probe_squares(rs, zs, crosses, torch.float32, impl="triton")
    doubles = [[t.double() for t in ts] for ts in (rs, zs, crosses)]
    want = probe_squares(*doubles, torch.float64, impl="ref")
    off = ((got - want).abs() / want.clamp(min=1e-30)).max().item()
    rs[0][32, 127] = float("inf")
    wrong = probe_squares(rs[:1], zs[:1], crosses[:1], torch.float32, impl="triton")
    report(off <= 3e-6 and not wrong.isfinite().any(), "probe", dtype, "aligned" if aligned else "", off)


def rescaled():
    """PROJECTED; the new scale is another, by up to ten either way. Then the same scale again: a no-op."""
    worst, ok, g = Worst(), True, torch.Generator().manual_seed(0)
    for shape in PROJECTED:
        state = random_state(shape, torch.int8, g, scaled=True)
        before, ref = copies([state])[0], copies([state])[0]
        d = state["d"] * 10 ** (2 * torch.rand(shape[-1], generator=g) - 1)
        rescale_(state, ("m", "v"), d, impl="triton")
        rescale_(ref, ("m", "v"), d, impl="ref")
        for name, t in state.items():
            worst.compare(name, t, ref[name], before[name])
        kept = copies([state])[0]
        rescale_(state, ("m", "v"), d, impl="triton")
        ok &= all(torch.equal(state[name], kept[name]) for name in ("m", "v", "d"))
    report(worst.verdict() and ok, "rescale", dict(worst))


def magnitudes(dtype):
    """tangent_ and magnitude_: rows of either sign and one near zero, updated and skipped, of both sides, and
    with what a lift that waits has beside W, rounded either way."""
    worst, ok, g, rounded = Worst(), True, torch.Generator().manual_seed(0), {}
    for shape in PROJECTED:
        x, a = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        mag, n, sums = (
            torch.randn(shape[0], generator=g),
            1 + torch.rand(shape[0], generator=g),
            x[:, 0].float().clone(),
        )
        mag[0] = -1e-30
        c, rho = torch.randn(shape, generator=g) / 10, 1 - torch.rand(shape[0], generator=g) / 9
        c = ((mag / n)[:, None] * c).to(dtype)  # of a row that is nearly zero so is C's
        some = shape[1] // 3
        parts = (c[:, some:].contiguous(), c[:, :some].contiguous(), rho)
        for late in (None, parts):
            y, ref, before = guarded(x), x.clone(), x.clone()
            s = tangent_(y, a, sums, mag, n, 1e-3, late, impl="triton")
            want = tangent_(ref, a, sums, mag, n, 1e-3, late, impl="ref")
            worst.compare("w", guarded(s), want, torch.zeros_like(want))
            worst.compare("w", y, ref, before)
        apart = torch.full((shape[0], shape[1] + 3), float("nan")).to(dtype)[:, : shape[1]]
        apart.copy_((mag / n)[:, None] * a)
        step = (torch.randn(shape, generator=g) / 100).to(dtype)
        state = {"mag": mag, "n": n, "mag_m": sums[None] / 9, "mag_v": sums[None].square() / 5}
        wide = step.float()
        sides = [(step, step, None), (step, step, "w"), (step, step, "v")]
        sides += [(wide, wide * (1 + torch.rand(shape, generator=g)), None)]
        for skipped, (left, right, late) in itertools.product((False, True), sides):
            h = table_of(1)[0]
            h[Column.OK] = 0 if skipped else 1
            own, copy = copies([state])[0], copies([state])[0]
            ours, others = [(guarded(c), guarded(rho)) if late else None for _ in "ab"]
            rest, noise = (0.5, *BETAS, 1e-3), late == "v"
            moved = torch.zeros_like(left) if skipped and late else left  # as a rule gives it
            outs = magnitude_(own, s, moved, apart, right, h, *rest, ours, noise, impl="triton")
            wants = magnitude_(copy, s, moved, apart, right, h, *rest, others, noise, impl="ref")
            for name, t in own.items():
                ok &= torch.allclose(t, copy[name], rtol=2e-6, atol=1e-9) and intact(t)
                ok &= skipped == torch.equal(t, state[name])
            ok &= all(torch.allclose(x, y, rtol=4e-6, atol=0) for x, y in zip(outs, wants, strict=True))
            ok &= not skipped or torch.equal(outs[0], torch.ones_like(s))
            ok &= all(bool(torch.isfinite(t).all()) for t in (*outs, *own.values()))
            if late:
                worst.compare(late, ours[0], others[0], c)
                rounded[late, skipped] = ours[0]
                ok &= torch.allclose(ours[1], others[1], rtol=4e-6, atol=0) and intact(ours[1])
                ok &= skipped == torch.equal(ours[0], c) == torch.equal(ours[1], rho)
    ok &= torch.equal(rounded["w", False], rounded["v", False]) == (dtype == torch.float32)
    report(worst.verdict() and ok, "magnitudes", dtype, dict(worst))


def row_factors(dtype, stochastic):
    """Factors near and far from one, one for all, or none, of W and of the product; one row infinite."""
    worst, g = Worst(), torch.Generator().manual_seed(0)
    for shape, kept in itertools.product(PROJECTED, ("rows", "one", "none", "product")):
        w = guarded(torch.randn(shape, generator=g).to(dtype))
        product = (torch.randn(shape, generator=g) / 100).to(dtype)
        before, h = w.clone(), table_of(1)[0]
        keep = 1 + torch.randn(shape[0], generator=g) / 1000
        factor = torch.randn(shape[0], generator=g) if kept in ("rows", "product") else None
        keep = {"rows": keep, "one": keep[0] - 0.3}.get(kept)
        product[-1, -1] = float("inf")
        ref = w.clone()
        rows_(w, product, keep, factor, h if stochastic else None, impl="triton")
        rows_(ref, product, keep, factor, h if stochastic else None, impl="ref")
        same = ref.isfinite()
        worst.ok &= torch.equal(w.isfinite(), same)
        worst.compare("v" if stochastic else "w", guarded(w.where(same, 0)), ref.where(same, 0), before)
        worst.ok &= intact(w)
    report(worst.verdict(), "rows", dtype, "stochastic" if stochastic else "nearest", dict(worst))


def natural_state(shape, history, store, scaled, g):
    past = moments.init(STORES[store], (history, *shape), "cpu", torch.float32, ("history",))
    state = random_state(shape, store, g, scaled) | {name: guarded(t) for name, t in past.items()}
    gram, slot = guarded(torch.zeros(history, history)), torch.zeros(1, dtype=torch.int64)
    return state | {"gram": gram, "slot": slot, "filled": torch.zeros((), dtype=torch.int64)}


def natural(grad, store, scaled):
    """As many updates as fill the history and more, of two gradients at once, rows apart and between NaNs;
    the third is skipped. Each starts from the reference's state: a code that differs must not add up."""
    worst, ok, g = Worst(), True, torch.Generator().manual_seed(0)
    # bf16: both factors of a product of stored numbers may be truncated, by 2^-7
    unit = 2**-6 if store == torch.bfloat16 else 1e-3 if store == torch.int8 else 1e-5
    several = [((4, 1), 3), ((0, 1), 1), ((1, 2), 4)]
    for pair, history in several if scaled else several[:1]:
        shapes = [PROJECTED[n] for n in pair]
        refs = [natural_state(shape, history, store, scaled, g) for shape in shapes]
        for update in range(history + 2):
            xs, hs = [], list(table_of(2))
            for shape, h in zip(shapes, hs, strict=True):
                x = torch.full((shape[0], shape[1] + 5), float("nan")).to(grad)[:, : shape[1]]
                xs.append(x.copy_((1 + torch.randn(shape, generator=g)) / torch.arange(1, shape[1] + 1)))
                if update == 2:
                    x[0, 0], h[Column.OK] = float("nan"), 0
            states, olds = copies(refs), copies(refs)
            parts = natural_dots_(xs, states, hs, impl="triton")
            want = natural_dots_(xs, refs, hs, impl="ref")[:, 0]
            for state, ref, old in zip(states, refs, olds, strict=True):
                for name in {"history", "history_scale"} & set(ref):
                    worst.compare(name, state[name], ref[name], old[name])
            w, _ = natural_weights_(parts, copies(refs), hs, 0.7, impl="triton")
            spread = torch.cat([want[:, None] / 2, want[:, None] / 4, want[:, None] / 4], 1)
            exact, place = natural_weights_(spread, states, hs, 0.7, impl="triton")
            others, at = natural_weights_(want[:, None], refs, hs, 0.7, impl="ref")
            ok &= torch.equal(place, at) and place.dtype == at.dtype
            for n, (x, h, state, ref, old) in enumerate(zip(xs, hs, states, refs, olds, strict=True)):
                for name in ("gram", "slot", "filled"):
                    ok &= torch.equal(state[name], ref[name]) and intact(state[name])
                both = [copies([ref])[0], ref]
                step, steps = (
                    natural_direction_(x, s, others[n], at[n], h, *BETAS, grad, impl=impl)
                    for s, impl in zip(both, ("triton", "ref"), strict=True)
                )
                if update == 2:
                    ok &= all(torch.equal(s[k], t) for k, t in old.items() for s in (state, both[0]))
                    ok &= torch.equal(step, torch.zeros(shapes[n], dtype=grad)) and torch.equal(step, steps)
                    continue
                size = want[n].abs().amax(1, keepdim=True)
                off = (parts[n].sum(0) - want[n]).abs()
                ok &= (off <= torch.tensor([[1e-5], [unit]]) * size).all().item()
                ok &= torch.allclose(exact[n], others[n], rtol=1e-5, atol=1e-6)
                ok &= torch.allclose(w[n], others[n], rtol=1e-3, atol=1e-4)
                ok &= step.is_contiguous() and steps.abs().max().item() > 0
                # fp32: where an old m and g~ cancel, the rounding of their size is left
                before = steps if grad == torch.bfloat16 else steps.abs().max().expand(steps.shape)
                worst.compare("n", guarded(step), steps, before)
                # and where g and the past cancel in g~, what is rounded is as large as g
                part = (1 - BETAS[0]) * h[Column.CLIP] * x.float().abs()
                if store == grad == torch.float32:
                    old["m"] = torch.maximum(old["m"].abs(), part)
                for name in set(ref) & {"m", "v", "m_scale", "v_scale"}:
                    worst.compare(name, both[0][name], ref[name], old[name])
    report(worst.verdict() and ok, "natural", grad, store, "scaled" if scaled else "", dict(worst))


for variant in NATURAL_VARIANTS:
    natural(*variant)
rescaled()
for dtype in (torch.float32, torch.bfloat16):
    magnitudes(dtype)
    for stochastic in (False, True):
        row_factors(dtype, stochastic)
for dtype in (torch.float32, torch.bfloat16):
    for aligned in (True, False):
        norms(dtype, aligned)
        probed(dtype, aligned)
for seed, (*kind, noise) in enumerate(VARIANTS):
    dense([kind], seed, noise)
for noise in (False, True):
    dense([kind for *kind, noisy in VARIANTS if not noisy], 10, noise)
dense([(torch.float32, torch.int8), (torch.float32, torch.float32)], 11, True)
for variant in DIRECTION_VARIANTS:
    direction(*variant)
for variant in PARTS_VARIANTS:
    parts(*variant)
for variant in GROUPED_VARIANTS:
    grouped(*variant)
for dtype in (torch.float32, torch.bfloat16):
    for vocabulary in (1, 7, 2047, 4097, 8192, 8193, 15000):
        g = torch.Generator().manual_seed(vocabulary)
        logits = (torch.randn(5, vocabulary, generator=g) * 4).to(dtype)
        logits[3] = torch.arange(vocabulary) % 7 * 30.0 - 90.0  # wide: exp of the plain logits would overflow
        labels = torch.randint(vocabulary, (5,), generator=g)
        labels[1] = -100
        exact = logits.double()
        want = cross_entropy_(exact, labels, True, impl="ref")
        for grad in (False, True):
            ours = logits.clone()
            nll = cross_entropy_(ours, labels, grad, impl="triton")
            off = (nll.double() - want).abs().max().item()
            ok = off <= 4e-6 * want.abs().max().item() + 1e-6
            if grad:  # bf16: one unit of each entry, as the interpreter truncates
                unit = 2**-7 if dtype == torch.bfloat16 else 1e-6
                ok &= ((ours.double() - exact).abs() <= unit * exact.abs() + 1e-6).all().item()
                ok &= ours[1].abs().max().item() == 0
            else:
                ok &= torch.equal(ours, logits)
            report(ok, "cross-entropy", dtype, vocabulary, "grad" if grad else "loss", off)
