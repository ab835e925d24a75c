"""Every variant compiled ahead of time for five cards, without a GPU; a process of test_kernels.py."""

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adam, cross_entropy, grouped, natural, norms, rescale, rows

FULL = 89  # every variant; for the others one of each kernel, 8-bit and bf16 where it has such
CARDS = (80, 86, 89, 90, 120)  # A100, RTX 3090, RTX 4090, H100 and H200, RTX 5090
SHARED = 101_376  # bytes a program may have on a 3090, 4090 or 5090
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "i8"}
BETAS = dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32")


def check(kernel, arguments, constants, warps, aligned, card, what):
    """Cubin within the card's shared memory, with 16-byte loads and stores if `aligned` is a list.

    aligned: names of the arguments that 16 divides, as a launch finds by itself; the compiler is told here.
    """
    signature = arguments | dict.fromkeys(constants, "constexpr")
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned or ()}
    source = ASTSource(kernel, signature, constants, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    ptx = built.asm["ptx"]
    loads = ptx.count("ld.global.v4") + ptx.count("cp.async.cg.shared.global")
    wide = [loads, ptx.count("st.global.v4")]
    # these store single numbers
    sums = kernel in (norms.squares_kernel, norms.probe_kernel)
    sums |= kernel is rows.magnitude_kernel and not constants["BESIDE"]
    needed = wide[:1] if sums else wide
    ok = len(built.asm["cubin"]) > 0 and built.metadata.shared <= SHARED
    ok &= aligned is None or min(needed) > 0
    return ok, f"{card} {what} shared {built.metadata.shared} 16-byte {wide}"


def cases():
    for weight, moment, noise in adam.VARIANTS:
        if weight == torch.bfloat16 and not noise and moment != torch.int8:
            continue  # a part of what is compiled with noise; each takes 7 seconds
        kinds = {"WEIGHT": adam.DTYPES[weight], "MOMENT": adam.DTYPES[moment], "NOISE": noise}
        kinds |= {"BLOCKS": adam.DENSE_TILE // adam.QUANT, "WIDTH": adam.QUANT}
        what = f"adam {weight} {moment} {'stochastic' if noise else 'nearest'}"
        arguments = {"addresses": "*i64", "tiles": "*i32", "table": "*fp32"} | BETAS
        yield adam.adam_kernel, arguments, kinds, adam.DENSE_WARPS, [], what
    for grad, out, moment, scaled in adam.DIRECTION_VARIANTS:
        pointers = {"g_ptr": grad, "n_ptr": out, "m_ptr": moment, "row": torch.float32}
        arguments = {name: f"*{TYPES[dtype]}" for name, dtype in pointers.items()}
        arguments["v_ptr"] = "*u8" if moment == torch.int8 else arguments["m_ptr"]
        arguments |= dict.fromkeys(("rows", "cols", "stride"), "i32") | BETAS
        kinds = {"MOMENT": adam.DTYPES[moment], "SCALED": scaled, "PARTS": False}
        eight = moment == torch.int8
        for name, given in (("m_scale", eight), ("v_scale", eight), ("d_ptr", scaled)):
            (arguments if given else kinds)[name] = "*fp32" if given else None
        even = [n for n in arguments if n not in BETAS and n != "rows"]
        shapes = {"4096 x 1024": (256, True, True, even)}
        if grad == out == torch.bfloat16 and eight:
            shapes |= {"4096 x 128": (128, True, True, even), "4097 x 1024": (256, True, False, even)}
            shapes |= {"512 x 5461": (256, False, False, None)}
        for shape, (width, columns, whole, aligned) in shapes.items():
            constants = kinds | {"EVEN": columns, "WHOLE": whole}
            constants |= {"BLOCKS": adam.TILE // width, "WIDTH": width}
            what = f"direction {grad} {out} {moment} {'scaled ' if scaled else ''}{shape}"
            yield adam.direction_kernel, arguments, constants, adam.WARPS, aligned, what
    for grad, moment in adam.PARTS_VARIANTS:
        pointers = {"g_ptr": grad, "n_ptr": torch.float32, "m_ptr": moment, "row": torch.float32}
        arguments = {name: f"*{TYPES[dtype]}" for name, dtype in pointers.items()}
        arguments["v_ptr"] = "*u8" if moment == torch.int8 else arguments["m_ptr"]
        arguments |= dict.fromkeys(("rows", "cols", "stride"), "i32") | BETAS
        constants = {"MOMENT": adam.DTYPES[moment], "SCALED": False, "PARTS": True, "d_ptr": None}
        for name in ("m_scale", "v_scale"):
            (arguments if moment == torch.int8 else constants)[name] = (
                "*fp32" if moment == torch.int8 else None
            )
        constants |= {"EVEN": True, "WHOLE": True, "BLOCKS": adam.TILE // 128, "WIDTH": 128}
        aligned = [n for n in arguments if n not in BETAS and n != "rows"]
        yield adam.direction_kernel, arguments, constants, adam.WARPS, aligned, f"parts {grad} {moment}"
    for grad, store, scaled in natural.VARIANTS:
        size, warps = natural.DOTS
        constants = {"GRAD": adam.DTYPES[grad], "S": 4, "P": 4, "STORE": adam.DTYPES[store], "SCALED": scaled}
        constants |= {"EVEN": True, "ALIGNED": True, "PARTS": natural.PARTS, "BLOCKS": size // 256}
        what = f"natural {grad} {store} {'scaled' if scaled else ''}"
        arguments = {"entries": "*i64", "out_ptr": "*fp32"}
        yield natural.dots_kernel, arguments, constants | {"WIDTH": 256}, warps, ["entries"], what
        size, warps = natural.DIRECTION
        arguments = {
            "g_ptr": f"*{TYPES[grad]}",
            "history": f"*{TYPES[store]}",
            "n_ptr": f"*{TYPES[grad]}",
        } | BETAS
        arguments |= {
            "w_ptr": "*fp32",
            "place_ptr": "*i64",
            "m_ptr": arguments["history"],
            "v_ptr": arguments["history"],
        }
        arguments |= {"row": "*fp32", "rows": "i32", "cols": "i32", "stride": "i32"}
        constants = {
            "S": 4,
            "STORE": adam.DTYPES[store],
            "SCALED": scaled,
            "EVEN": True,
            "BLOCKS": size // 256,
        }
        if store == torch.int8:
            arguments["v_ptr"] = "*u8"
        for name in ("scales", "m_scale", "v_scale", "d_ptr"):
            given = scaled if name == "d_ptr" else store == torch.int8
            (arguments if given else constants)[name] = "*fp32" if given else None
        aligned = [n for n in arguments if n not in (*BETAS, "rows", "w_ptr", "place_ptr")]
        yield natural.direction_kernel, arguments, constants | {"WIDTH": 256}, warps, aligned, what
    for history in (64, 4):
        arguments = {
            "entries": "*i64",
            "dots": "*fp32",
            "parts": "i32",
            "w_ptr": "*fp32",
            "place_ptr": "*i64",
        }
        constants = {"SMALL": 1e-31, "S": history, "P": history, "MANY": natural.SOLVE // history}
        arguments |= {"damping": "fp32"}
        yield natural.weights_kernel, arguments, constants, 4, None, f"solve {history}"
    for (weight, direction, noise), (size, decay) in itertools.product(
        grouped.VARIANTS, ((32, False), (43, True))
    ):
        arguments = {"w_ptr": f"*{TYPES[weight]}", "parts_ptr": "*fp32", "d_ptr": f"*{TYPES[direction]}"}
        arguments |= {"rows": "i32", "cols": "i32", "stride": "i32", "eps": "fp32"}
        constants = {"DECAY": decay, "NOISE": noise, "SIZE": size, "EVEN": size == 32, "WIDTH": grouped.LANES}
        constants["BLOCKS"] = adam.TILE // grouped.LANES
        for name, given in (("keep_ptr", decay), ("row", noise)):
            (arguments if given else constants)[name] = "*fp32" if given else None
        aligned = ["w_ptr", "parts_ptr", "d_ptr", "cols", "stride"] if size == 32 else None
        what = f"grouped {weight} {direction} {size} {'decay ' if decay else ''}"
        what += "stochastic" if noise else "nearest"
        yield grouped.grouped_kernel, arguments, constants, adam.WARPS, aligned, what
    for dtype, aligned in itertools.product(norms.DTYPES, (True, False)):
        constants = {"DTYPE": norms.DTYPES[dtype], "ALIGNED": aligned, "BLOCKS": norms.BLOCKS}
        constants["WIDTH"] = norms.WIDTH
        arguments = {"entries": "*i64", "out": "*fp32"}
        what = f"squares {dtype} {'aligned' if aligned else ''}"
        sums = arguments | {"width": "i32"}
        yield norms.squares_kernel, sums, constants, norms.WARPS, [] if aligned else None, what
        constants = {"DTYPE": norms.DTYPES[dtype], "ALIGNED": aligned, "LINES": norms.LINES}
        constants["FACTOR"] = constants["DTYPE"]
        constants |= {"WIDTH": norms.ACROSS, "K": norms.PROBE}
        what = f"probe {dtype} {'aligned' if aligned else ''}"
        yield norms.probe_kernel, arguments, constants, norms.WARPS, [] if aligned else None, what
    for signed, (width, whole) in itertools.product((True, False), ((256, True), (128, True), (256, False))):
        arguments = {"code_ptr": "*i8" if signed else "*u8", "scale_ptr": "*fp32", "ratio_ptr": "*fp32"}
        arguments |= {"rows": "i32", "cols": "i32"}
        constants = {"SIGNED": signed, "EVEN": whole, "BLOCKS": adam.TILE // width, "WIDTH": width}
        aligned = [n for n in arguments if n != "rows"] if whole else None
        what = f"rescale {'signed' if signed else 'unsigned'} {width} {whole}"
        yield rescale.rescale_kernel, arguments, constants, adam.WARPS, aligned, what
    ends = [(True, "rows", True, True), (False, "rows", True, True), (True, "rows", True, False)]
    ends += [(True, "none", False, True), (True, "one", False, False), (False, "none", True, False)]
    for dtype, (whole, keep, factor, stochastic) in itertools.product(norms.DTYPES, ends):
        arguments = dict.fromkeys(("w_ptr", "p_ptr"), f"*{TYPES[dtype]}") | {"rows": "i32", "cols": "i32"}
        constants = {"KEEP": keep, "FACTOR": factor, "STOCHASTIC": stochastic}
        constants |= {"EVEN": whole, "BLOCKS": adam.TILE // rows.LANES, "WIDTH": rows.LANES}
        for name, given in (("keep_ptr", keep != "none"), ("factor_ptr", factor), ("row", stochastic)):
            (arguments if given else constants)[name] = "*fp32" if given else None
        aligned = [n for n in arguments if n != "rows"] if whole else None
        what = f"rows {dtype} {keep} {'stochastic' if stochastic else 'nearest'} {whole}"
        yield rows.rows_kernel, arguments, constants, adam.WARPS, aligned, what
    forms = ((False, True), (False, False), (True, False))
    for dtype, (whole, late) in itertools.product(norms.DTYPES, forms):
        arguments = dict.fromkeys(("x_ptr", "a_ptr"), f"*{TYPES[dtype]}")
        arguments |= dict.fromkeys(("sums_ptr", "mag_ptr", "n_ptr", "s_ptr"), "*fp32")
        arguments |= {"rows": "i32", "cols": "i32", "r": "i32", "least": "fp32"}
        constants = {"EVEN": whole, "BLOCKS": rows.TANGENT, "WIDTH": rows.LANES, "BESIDE": late}
        for name in ("c_ptr", "z_ptr", "rho_ptr"):
            kind = "*fp32" if name == "rho_ptr" else f"*{TYPES[dtype]}"
            (arguments if late else constants)[name] = kind if late else None
        # 1040 columns, of which 16 are the probe's, are a multiple of 16, not of 256
        aligned = [n for n in arguments if n not in ("rows", "least")]
        what = f"tangent {dtype} {whole} {late}"
        yield rows.tangent_kernel, arguments, constants, adam.WARPS, aligned, what
    # bf16 on the output side: P and P dV dV^T in fp32, W dV^T in bf16. Of a lift that waits: C's rounding
    for x, a, same, late in (
        ("bf16", "bf16", True, "stochastic"), ("bf16", "bf16", True, "nearest"), ("bf16", "bf16", True, None),
        ("fp32", "fp32", True, None), ("fp32", "fp32", True, "nearest"), ("fp32", "bf16", False, None),
    ):  # fmt: skip
        arguments = {"x_ptr": f"*{x}", "a_ptr": f"*{a}", "b_ptr": f"*{x}"}
        vectors = ("mag_ptr", "n_ptr", "m_ptr", "v_ptr", "s_ptr", "keep_ptr", "factor_ptr", "row")
        arguments |= dict.fromkeys(vectors, "*fp32")
        arguments |= dict.fromkeys(("rows", "cols", "stride"), "i32")
        aligned = [n for n in arguments if n != "rows"]
        arguments |= {"rate": "fp32", "least": "fp32"} | BETAS
        constants = {"SAME": same, "BLOCKS": rows.LINES, "WIDTH": rows.LONG}
        constants |= {"BESIDE": late is not None, "STOCHASTIC": late == "stochastic"}
        for name, kind in (("c_ptr", f"*{x}"), ("rho_ptr", "*fp32")):
            (arguments if late else constants)[name] = kind if late else None
        aligned += ["c_ptr", "rho_ptr"] if late else []
        warps, what = rows.FEW if same and not late else rows.MANY, f"magnitudes {x} {a} {same} {late}"
        yield rows.magnitude_kernel, arguments, constants, warps, aligned, what
    for dtype, grad in cross_entropy.VARIANTS:
        arguments = {"logits": f"*{TYPES[dtype]}", "labels": "*i64", "nll": "*fp32"}
        arguments |= {"V": "i32", "ignore": "i32"}
        constants = {"GRAD": grad, "BLOCK": cross_entropy.BLOCK}
        yield (
            cross_entropy.cross_entropy_kernel,
            arguments,
            constants,
            cross_entropy.WARPS,
            None,
            f"loss {dtype}",
        )


def compiled(job):
    n, card = job
    *case, what = list(cases())[n]
    return check(*case, card, what)


if __name__ == "__main__":
    every = list(enumerate(cases()))
    usual = sorted(reversed(every), key=lambda job: ("int8" in job[1][-1], "bfloat16" in job[1][-1]))
    few = {kernel: n for n, (kernel, *_) in usual}.values()  # the last of each
    jobs = [(n, card) for card in CARDS for n in (range(len(every)) if card == FULL else few)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(compiled, jobs))
    for ok, line in done:
        print("ok " if ok else "BAD", line)
    sys.exit(not all(ok for ok, _ in done))
