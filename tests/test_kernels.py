"""Kernels without a GPU: through Triton's interpreter, and compiled for the cards that users have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.reference import Column
from optim import moments
from tests.mutants import kills

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton")


def run(script, **env):
    command = [sys.executable, str(ROOT / "tests/kernels" / script)]
    # 3.10 stops fusing multiply and add by default: named, so that results do not change with the version
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"} | env
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@kills("kernels/adam.py", "code = tl.where((v > 0) & (code == ZERO), code + 1, code)", "pass")
@kills("kernels/adam.py", "(byte ^ 128) | 0x4B000000", "byte | 0x4B000000")
@kills("kernels/adam.py", "unit = rows * across + tile % across", "unit = rows * across")
@kills("kernels/adam.py", "at, line * across + program % across", "at, line * across")
@kills("kernels/adam.py", "mask = (col < cols)[None, :] & (at < numbers)", "mask = at < numbers")
@kills("kernels/adam.py", "mask = mask & (col < cols)[None, :]", "mask = mask")
@kills("kernels/adam.py", "v = v * (d * d)", "v = v * d")
@kills("kernels/adam.py", "m = m * inverse", "m = m")
@kills("kernels/adam.py", "(x + 12582912.0)", "(x - 0.1 + 12582912.0)")
@kills("kernels/adam.py", "(-tl.load(row) * direction)", "(tl.load(row) * direction)")
@kills("kernels/adam.py", "direction = top\n", "direction = top / (below + eps)\n")
@kills("kernels/adam.py", "n_ptr + second, tl.zeros", "n_ptr + at, tl.zeros")
@kills("kernels/grouped.py", "(root * tl.abs(d) + eps)", "(root * d + eps)")
@kills("kernels/grouped.py", "(line + rows).to", "line.to")
@kills("kernels/grouped.py", "w = w * tl.load(keep_ptr)", "pass")
@kills("kernels/adam.py", "[:, None] * stride", "[:, None] * cols")
@kills("kernels/adam.py", "table + 8 * tl.load(entry + 8)", "table + 8 * 0 * tl.load(entry + 8)")
@kills(
    "kernels/adam.py", "if tl.load(row + 3) > 0:  # a non-finite", "if tl.load(row + 3) >= 0:  # a non-finite"
)
@kills(
    "kernels/adam.py", "    if tl.load(row + 3) > 0:\n        if SCALED", "    if True:\n        if SCALED"
)
@kills("kernels/cross_entropy.py", "at + 3 * BLOCK, mask=at + 3 * BLOCK < V", "at + 3 * BLOCK, mask=at < V")
@kills("kernels/cross_entropy.py", "+ tl.exp(d - new))", "+ tl.exp(c - new))")
@kills("kernels/cross_entropy.py", "range(0, V, 4 * BLOCK)", "range(0, V, 5 * BLOCK)")
@kills("kernels/cross_entropy.py", "total * tl.exp(top - new) + more", "total + more")
@kills("kernels/norms.py", "tiles = tl.cdiv(rows, BLOCKS) * across", "tiles = tl.cdiv(rows, BLOCKS)")
@kills("kernels/norms.py", "tl.where(part < parts, part, tiles)", "part")
@kills("kernels/norms.py", "torch.zeros(len(tensors), MANY", "torch.zeros(len(tensors), PARTS")
@kills("kernels/norms.py", "range(0, rank, WIDTH)", "range(0, WIDTH, WIDTH)")
@kills("kernels/norms.py", "inside & (col < rank)[None, :]", "inside")
@kills("kernels/norms.py", "z.to(tl.float32) - held", "z.to(tl.float32) + held")
@kills("kernels/norms.py", "tl.cdiv(rows, LINES), parts)", "tl.cdiv(rows, LINES), 2 * parts)")
@kills("kernels/norms.py", "line[:, None] * z_stride", "line[:, None] * r_stride * 0")
@kills("kernels/norms.py", "held = tl.zeros((LINES, K), tl.float32)", "held = 0 * rest + 1e-3")
@kills("kernels/norms.py", "(line < rows)[:, None] & (col < cols)[None, :]", "(line < rows)[:, None]")
@kills("kernels/norms.py", "(line < rows)[:, None] & (col < cols)[None, :]", "(col < cols)[None, :]")
@kills("kernels/norms.py", "line[:, None] * stride", "line[:, None] * cols")
@kills("kernels/norms.py", "total += x * x", "total = x * x")
@kills("kernels/norms.py", "part, tl.sum(total)", "0 * part, tl.sum(total)")
@kills(
    "kernels/rows.py", "x = stochastic(x, bits(at, row) >> 16)", "x = stochastic(x, bits(at, row) & 0xFFFF)"
)
@kills("kernels/rows.py", "x = stochastic(x, bits(at, row) >> 16)", "pass")
@kills("kernels/rows.py", "tl.load(keep_ptr + line, mask", "tl.load(keep_ptr + 0 * line, mask")
@kills("kernels/rows.py", "w = w * tl.load(keep_ptr)", "pass")
@kills("kernels/rows.py", '"rows" if keep.ndim else "one"', '"rows"')
@kills("kernels/rows.py", "square += x * b", "square += x * x")
@kills("kernels/rows.py", "b = x if SAME else", "b = x if True else")
@kills("kernels/rows.py", "+ tl.sum(square, 1)", "")
@kills("kernels/rows.py", "(n / mag) * tl.sum(along, 1)", "(n / old) * tl.sum(along, 1)")
@kills("kernels/rows.py", "(top / (below + eps)) * rate", "(top / (below + eps))")
@kills("kernels/rows.py", "tl.load(row + 1) * old", "old")
@kills("kernels/rows.py", "a_ptr + line[:, None] * stride", "a_ptr + line[:, None] * cols")
@kills("kernels/rows.py", "mask = inside[:, None] & (col < cols)[None, :]", "mask = inside[:, None]")
@kills("kernels/rows.py", "tl.where(ok, inside, False)", "inside")
@kills("kernels/rows.py", "tl.where(ok, new, old)", "new")
@kills("kernels/rows.py", "tl.where(ok, length, n)", "length")
@kills("kernels/rows.py", "(length * mag), 1.0)", "(length * mag), 0.5)")
@kills("kernels/rows.py", "(col < cols)[None, :] & inside[:, None]", "(col < cols)[None, :]")
@kills("kernels/rows.py", "(col < cols)[None, :] & inside[:, None]", "inside[:, None]")
@kills("kernels/rows.py", "c = stochastic(c, bits(at, row) >> 16)", "pass")
@kills("kernels/rows.py", "c = c * keep[:, None]", "c = c")
@kills("kernels/rows.py", "rho * keep", "rho")
@kills("kernels/rows.py", "a * rho[:, None]", "a")
@kills("kernels/rows.py", "STOCHASTIC=noise and c is not None", "STOCHASTIC=c is not None")
@kills("kernels/rows.py", "(cols - r) + (col - r)[None, :]", "(cols - r) + col[None, :]")
@kills("kernels/rows.py", "c_ptr + place * r", "c_ptr + place * cols")
@kills("kernels/rows.py", "mask & (col >= r)[None, :]", "mask")
@kills("kernels/rows.py", "mask & (col < r)[None, :]", "mask")
@kills("kernels/rows.py", "new * n / (length * mag)", "new / mag")
@kills("kernels/rows.py", "c[:, None] * (x - (s / mag)[:, None] * a)", "c[:, None] * (x - s[:, None] * a)")
@kills("kernels/rows.py", "if tl.program_id(0) % tl.cdiv(cols, WIDTH) == 0:", "if False:")
@kills("kernels/rescale.py", "(255 / tl.sqrt(largest))", "(254 / tl.sqrt(largest))")
@kills("kernels/rescale.py", "tl.where((x > 0) & (code == ZERO), code + 1, code)", "code")
@kills("kernels/rescale.py", "ratio * ratio if second", "ratio if second")
@kills("kernels/rescale.py", 'ratio = state["d"] / d', 'ratio = d / state["d"]')
@kills("kernels/adam.py", "(random if EARLY else bits(at, row)) >> 16", "bits(at, row) & 0xFFFF")
@kills("kernels/adam.py", "tl.bfloat16 or NOISE and MOMENT == tl.int8", "tl.bfloat16 and NOISE")
@kills("kernels/adam.py", "random & 0xFFFF", "random >> 16")
@kills(
    "kernels/adam.py",
    "tl.where(x == x, noisy.to(tl.float32, bitcast=True), x)",
    "noisy.to(tl.float32, bitcast=True)",
)
@kills("kernels/adam.py", "NOISE=noise and ws[0].dtype == torch.bfloat16", "NOISE=noise")
@kills("kernels/adam.py", "NOISE=noise and ws[0].dtype == torch.bfloat16", "NOISE=False")
@kills("kernels/grouped.py", "bits(element, row)", "bits(at, row)")
@kills("kernels/grouped.py", "bits(element, row) >> 16", "bits(element, row) & 0xFFFF")
@kills("kernels/grouped.py", "NOISE=h is not None", "NOISE=False")
@kills(
    "kernels/dispatch.py",
    "table, tiles, beta1, beta2, eps, noise)",
    "table, tiles, beta1, beta2, eps, False)",
)
@kills("kernels/adam.py", "WHOLE=even and rows % blocks == 0", "WHOLE=even")
@kills("kernels/adam.py", "WHOLE=even and rows % blocks == 0", "WHOLE=rows % blocks == 0")
@kills("kernels/natural.py", "tl.sum(tl.sum(kept * kept, 1), 0)", "tl.sum(tl.sum(kept * g * 0, 1), 0)")
@kills("kernels/natural.py", "tl.sum(tl.sum(g * g, 1), 0)", "tl.sum(tl.sum(g * kept, 1), 0)")
@kills("kernels/natural.py", "i = (slot + k) % S", "i = k")
@kills("kernels/natural.py", "i = (place + k) % S", "i = k")
@kills("kernels/natural.py", "tl.sum(x * g, 1) * factor", "tl.sum(x * g, 1)")
@kills("kernels/natural.py", "tl.sum(x * kept, 1) * factor", "tl.sum(x * kept, 1)")
@kills("kernels/natural.py", "factor = factor * tl.load(w_ptr + i)", "factor = tl.load(w_ptr + i)")
@kills("kernels/natural.py", "        if moves:\n", "        if True:\n")
@kills("kernels/natural.py", "range(part, tl.cdiv(rows", "range(0, tl.cdiv(rows")
@kills("kernels/natural.py", "(tl.load(entry + 9) * PARTS + part)", "part")
@kills("kernels/natural.py", "(n * parts + part)[:, None]", "part[:, None]")
@kills("kernels/natural.py", "range(0, parts, MANY)", "range(0, MANY, MANY)")
@kills("kernels/natural.py", "w_ptr + n * S + one", "w_ptr + one")
@kills(
    "kernels/natural.py",
    "beta2, rest2, STORE, SCALED, True, True,",
    "beta2, rest2, STORE, SCALED, True, False,",
)
@kills("kernels/natural.py", "if tl.load(row + 3) > 0:\n        gram", "if True:\n        gram")
@kills("kernels/natural.py", "x - factor * top", "x + factor * top")
@kills("kernels/natural.py", "(slot + 1) % S", "slot + 1")
@kills("kernels/natural.py", "if tl.load(row + 3) > 0:\n        place", "if True:\n        place")
@kills("kernels/natural.py", "n = -tl.load(row)", "n = tl.load(row)")
@kills("kernels/natural.py", "random = bits(at, row)", "random = bits(at + 1, row)")
@kills("kernels/natural.py", "y = g * tl.load(w_ptr + place)", "y = g")
@kills("kernels/natural.py", "            x = x * d\n", "            pass\n")
@kills("kernels/natural.py", "kept = kept * d", "pass")
@kills("kernels/natural.py", "return g.to(tl.float32) * tl.load(row + 2)", "return g.to(tl.float32)")
def test_interpreted_kernels_equal_the_reference():
    code, out = run("interpreted.py", TRITON_INTERPRET="1")
    assert code == 0 and out.count("ok ") == 88, out


@kills(
    "kernels/adam.py",
    "w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)",
    "w_ptr = tl.load(entry)",
)
@kills("kernels/adam.py", "TILE = 2048", "TILE = 1 << 21")
@kills("kernels/norms.py", "x_ptr = tl.multiple_of(x_ptr, 16)", "pass")
@kills("kernels/norms.py", "cols, stride = tl.multiple_of(cols, 8), tl.multiple_of(stride, 8)", "pass")
def test_kernels_compile_for_five_cards(tmp_path):
    code, out = run("compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert code == 0 and out.count("ok ") == 153, out


BETAS = (0.9, 0.999, 1e-8)


def tensors(store="fp32", shape=(2, 5), dtype=torch.float32):
    """Arguments of adam_ for one parameter, all ones."""
    state = moments.init(store, shape, "cpu", torch.promote_types(dtype, torch.float32))
    for t in state.values():
        t.fill_(1)
    return [torch.ones(shape, dtype=dtype)], [torch.ones(shape, dtype=dtype)], [state], torch.ones(1, 8), None


@kills("kernels/dispatch.py", "choose([x, a, sums, mag, n, *(beside or ())]", "choose([x, a, sums, mag, n]")
@kills("kernels/dispatch.py", "choose([x, b, *vectors, *(beside or ())[:1]]", "choose([x, b, *vectors]")
@kills("kernels/dispatch.py", '"mag_v")), *(beside or ())[1:]]', '"mag_v"))]')
@kills("kernels/dispatch.py", "n, *(beside or ())[2:])}", "n)}")
def test_a_kernel_that_cannot_run_says_why():
    with pytest.raises(ValueError, match=r"impl=triton.*float64"):
        kernels.adam_(*tensors(dtype=torch.float64), *BETAS, impl="triton")
    ws, gs, *rest = tensors(shape=(10,))
    with pytest.raises(ValueError, match=r"impl=triton.*16-byte"):
        kernels.adam_([torch.ones(11)[1:]], gs, *rest, *BETAS, impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*bfloat16 gradients of torch.float32 weights"):
        kernels.adam_(ws, [gs[0].bfloat16()], *rest, *BETAS, impl="triton")
    eight = tensors("int8")
    (state,), h = eight[2], eight[3][0]
    with pytest.raises(ValueError, match=r"impl=triton.*rows are not contiguous"):
        kernels.adam_direction(torch.ones(5, 2).T, state, h, *BETAS, torch.float32, impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*float64"):
        kernels.adam_direction(torch.ones(2, 5), state, h, *BETAS, torch.float64, impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*rows are not contiguous"):
        kernels.squares([torch.ones(5, 2).T], torch.float32, impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*float32 and .*bfloat16|bfloat16 and .*float32"):
        kernels.squares([ws[0], gs[0].bfloat16()], torch.float32, impl="triton")
    r, z, cross = [torch.ones(5, 2)], [torch.ones(5, 16)], [torch.ones(2, 16)]
    for given, match in (
        ((r, r, cross), "other than 16 columns"),
        (([torch.ones(2, 5).T], z, cross), "rows are not contiguous"),
        ((r, [z[0].bfloat16()], cross), "bfloat16 and torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"impl=triton.*{match}"):
            kernels.probe_squares(*given, torch.float32, impl="triton")
    x, v, h = torch.ones(4, 4), torch.ones(4), torch.ones(8)
    own = {"mag": v, "n": v, "mag_m": v[None], "mag_v": v[None]}
    for c, rho, match in ((x.T[:, :2], v, "not contiguous"), (x[:, :2].clone(), v.bfloat16(), "bfloat16")):
        with pytest.raises(ValueError, match=f"impl=triton.*{match}"):
            kernels.tangent_(x, x, v, v, v, 1e-6, (c, c.clone(), rho), impl="triton")
    for c, rho, match in ((torch.ones(4, 8)[:, :4], v, "not contiguous"), (x, v.bfloat16(), "bfloat16")):
        with pytest.raises(ValueError, match=f"impl=triton.*{match}"):
            kernels.magnitude_(own, v, x, x, x, h, 1, *BETAS, 1e-6, (c, rho), impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*float64"):
        kernels.squares(gs, torch.float64, impl="triton")
    state["d"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"impl=triton.*column scale"):
        kernels.adam_(*eight, *BETAS, impl="triton")


def test_auto_is_the_reference_on_a_cpu():
    assert kernels.choose([torch.ones(4)], "auto", (torch.float32,)) == "ref"


STORES = ("fp32", "bf16", "int8")


@kills("kernels/reference.py", "scales.copy_(torch.where(ok > 0, fresh, scales))", "scales.copy_(fresh)")
@kills("kernels/reference.py", "stored.copy_(torch.where(ok > 0, value, stored))", "stored.copy_(value)")
@kills("kernels/reference.py", "-h[Column.LR] * direction, 0.0)", "-h[Column.LR] * direction, direction)")
@kills("kernels/reference.py", "torch.where(h[Column.OK] > 0, new, w.to(wide))", "new")
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("store", STORES)
def test_reference_skips_whole(store, noise):
    ws, gs, states, table, plan = tensors(store, dtype=torch.bfloat16 if noise else torch.float32)
    before = {name: t.clone() for name, t in states[0].items()}
    table[0, Column.OK] = 0
    gs[0][1, 2] = float("nan")
    kernels.adam_(ws, gs, states, table, plan, *BETAS, noise, impl="ref")
    n = kernels.adam_direction(gs[0], states[0], table[0], *BETAS, torch.float32, impl="ref")
    assert torch.equal(ws[0], torch.ones_like(ws[0])) and torch.equal(n, torch.zeros(2, 5))
    assert all(torch.equal(t, before[name]) for name, t in states[0].items())


@kills("kernels/reference.py", "-h[Column.LR] * direction, 0.0)", "h[Column.LR] * direction, 0.0)")
@kills("kernels/reference.py", "wide), g.to(wide) * h[Column.CLIP]\n    m =", "wide), g.to(wide)\n    m =")
@kills("kernels/reference.py", "return top / (root + eps)", "return top / root")
@pytest.mark.parametrize("store", STORES)
def test_a_dense_step_adds_the_direction_and_is_the_formula(store):
    g = torch.Generator().manual_seed(0)
    w, grad = torch.randn(2, 3, 70, generator=g, dtype=torch.float64)
    h = torch.tensor([0.1, 0.99, 0.5, 1, 4, 0, 1 - 0.9**4, 1 - 0.999**4], dtype=torch.float64)
    a, b = (moments.init(store, (3, 70), "cpu", torch.float64) for _ in range(2))
    for state in (a, b):
        kernels.save_(state, "m", w / 7, h[3], h[4], h[5])
        kernels.save_(state, "v", w * w / 9, h[3], h[4], h[5])
    m, v = (kernels.load(a, name, torch.float64) for name in "mv")
    new = w.clone()
    eps = 0.3
    kernels.adam_([new], [grad], [a], h[None], None, 0.9, 0.999, eps)
    n = kernels.adam_direction(grad, b, h, 0.9, 0.999, eps, torch.float64)
    m, v = 0.9 * m + 0.1 * grad / 2, 0.999 * v + 0.001 * (grad / 2) ** 2
    u = m / (1 - 0.9**4) / ((v / (1 - 0.999**4)).sqrt() + eps)
    torch.testing.assert_close(new, 0.99 * w - 0.1 * u, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(n, -0.1 * u, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a[name], b[name]) for name in a)


@kills("kernels/check.py", "return max(far(a, b)", "return min(far(a, b)")
@kills("kernels/check.py", "gap, y = torch.where(both, 0, x - y)", "gap, y = torch.where(both, 0, x - x)")
@kills("kernels/check.py", "return 1 if wrong else 0", "return 0")
@kills("kernels/check.py", "4 * tol * largest", "400 * tol * largest")
def test_check_believes_the_kernels_and_no_others():
    """python -m kernels.check, small and in the interpreter; then one whose results are a little wrong."""
    wrong = """
c.CASES = {"tangent": c.CASES["tangent"]}
real = c.CASES["tangent"].call
def call(x, impl):
    s = real(x, impl)
    if impl == "triton":
        x["x"][-1, -1] += 0.5
    return s
c.CASES["tangent"].call = call"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "1"}
    for lines, status, said in (("pass", 0, "all 21 kernels agree"), (wrong, 1, "WRONG: tangent\n")):
        script = "import sys, kernels.check as c\n" + lines + "\nsys.exit(c.main([]))"
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "") and said in done.stdout, (
            done.stdout + done.stderr
        )
        assert max(map(len, done.stdout.splitlines())) <= 80
    for command in ("kernels.check", "kernels.bench adam"):
        plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", *command.split()], env=plain | {"CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr
