"""Every method with every setting that others have: what makes sense trains, the rest is refused by name.

python tests/test_matrix.py       all of them; the test takes two hundred at random
"""

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from optim import Velora, attach
from optim.methods import METHODS
from tests.tiny import Tiny, batches, flat, keys, summed_loss

METHOD = ["adamw", "galore", "gradnormlorp", "gradnormlorp_adapter", "adarankgrad", "natural_galore"]
AXES = {
    "moments": [None, "int8"],
    "velora": [None, ("v", "down")],
    "run": [(1, None), (3, False)],  # micro-batches, checkpointing with this use_reentrant
    "clip_mode": ["off", "exact", "two_pass", "global_estimated", "projected", "per_layer"],
    "update": [None, "in_backward", "after"],
    "lift": [None, "deferred"],
    "side": [None, "output", "both", "paper"],
}
EVERY = [dict(zip(("method", *AXES), x, strict=True)) for x in itertools.product(METHOD, *AXES.values())]
SAMPLE = 200


def refused(c):
    """Why this cannot be, as the keys that must be in what is said; empty: it can."""
    fields = METHODS[c["method"]].config.__dataclass_fields__
    modes = METHODS[c["method"]].config.CHOICES["clip_mode"]
    if c["side"] and "side" not in fields or c["lift"] and "lift" not in fields:
        return {"side", "lift"}
    if c["clip_mode"] not in modes:
        return {"clip_mode"}
    if c["side"] and c["side"] not in METHODS[c["method"]].config.CHOICES["side"]:
        return {"side"}
    if c["lift"] and (c["side"] or c["method"] == "gradnormlorp_adapter"):
        return {"lift"}
    if c["clip_mode"] == "two_pass" and (c["run"][0] > 1 or c["update"] == "after"):
        return {"accum_steps", "update", "clip_mode"}
    if c["clip_mode"] == "exact" and c["update"] == "in_backward":
        return {"update", "clip_mode"}
    return set()


def settings(c):
    given = {k: c[k] for k in ("moments", "lift", "side", "update") if c[k]}
    if c["clip_mode"] != "off":
        given |= {"clip_mode": c["clip_mode"], "clip": 0.5}
    return {**keys(c["method"]), **given}


def build(c):
    model = Tiny(checkpointing=c["run"][1])
    velora = Velora(c["velora"], 4) if c["velora"] else None
    return model, attach(model, c["method"], accum_steps=c["run"][0], velora=velora, **settings(c))


def trained(c, steps=4):
    model, opt = build(c)
    if c["velora"]:
        with opt.observing():
            model(batches(1)[0])
    for tokens in batches(steps):
        for _ in range(opt.passes):
            for part in tokens.chunk(c["run"][0]):
                (summed_loss(model, part) / 60).backward()
        opt.step()
        opt.zero_grad()
    return flat(model)


def check(c):
    """Refused as it should be; or it trains, and micro-batches and recomputing change rounding only."""
    if why := refused(c):
        with pytest.raises(ValueError) as error:
            build(c)
        said = str(error.value)
        assert any(key in said for key in why) and ";" in said or "unknown" in said, (c, said)
        return False
    weights = trained(c)
    assert torch.isfinite(weights).all(), c
    plain = c | {"run": (1, None)}
    want = trained(plain) if plain != c else weights
    # codes of 8 bit flip on a last place
    tol = 2e-2 if c["moments"] else 1e-9
    assert (weights - want).norm() <= tol * (want - flat(Tiny())).norm(), c
    return True


def test_some_of_all():
    rng = random.Random(0)
    ran = [check(c) for c in rng.sample(EVERY, SAMPLE)]
    assert 30 < sum(ran) < SAMPLE - 30


if __name__ == "__main__":
    ran = [check(c) for c in EVERY]
    print(f"{len(EVERY)} combinations: {sum(ran)} train, {len(ran) - sum(ran)} are refused, each by name")
