"""The learning-rate schedule: values at the corners, monotone after warm-up, every update used once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import factor


@given(
    st.integers(2, 2000),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_corners_and_shape(steps, warmup, ratio, schedule):
    f = [factor(s, steps, schedule=schedule, warmup=warmup, min_lr_ratio=ratio) for s in range(1, steps + 1)]
    warm = round(warmup * steps)
    if warm:
        assert f[warm - 1] == 1.0
        assert f[0] == 1 / warm  # the first update is not wasted at lr 0
        assert all(a < b for a, b in zip(f[: warm - 1], f[1:warm], strict=True))
    if warm < steps:
        assert f[-1] == pytest.approx(1.0 if schedule == "constant" else ratio, abs=1e-12)
        after = f[max(0, warm - 1) :]
        assert all(a >= b - 1e-15 for a, b in zip(after, after[1:], strict=False))
        jump = max((a - b for a, b in zip(after, after[1:], strict=False)), default=0)
        # continuous: slope of the cosine is at most pi/2
        assert jump <= 1.6 * (1 - ratio) / (steps - warm) + 1e-12
    assert all(0 <= x <= 1 for x in f)


def test_known_values():
    cosine = {"schedule": "cosine", "warmup": 0.1, "min_lr_ratio": 0.1}
    assert factor(55, 100, **cosine) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(5, 100, **cosine) == pytest.approx(0.5)
    for outside in (0, 101):
        with pytest.raises(ValueError, match=str(outside)):
            factor(outside, 100, **cosine)
