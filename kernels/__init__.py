"""Fused updates: a Triton kernel beside a plain torch reference that says what it computes.

`impl` chooses: "ref" anywhere and in any float dtype, "triton" on CUDA (on the CPU only under Triton's
interpreter), "auto" Triton on CUDA and the reference elsewhere. It is an argument, resolved at the call.
Imports torch and triton only.
"""

from .constant import capturing, constant, kept
from .dispatch import (
    adam_,
    adam_direction,
    adam_parts,
    choose,
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
    squares,
    tangent_,
)
from .history import push_
from .lift import lift_
from .reference import (
    PROBE,
    QUANT,
    SECOND,
    Column,
    dequantise,
    divisor,
    load,
    quantise,
    save_,
    stochastic_bf16,
    write_,
)

__all__ = [
    "PROBE",
    "QUANT",
    "SECOND",
    "Column",
    "adam_",
    "adam_direction",
    "adam_parts",
    "capturing",
    "choose",
    "constant",
    "cross_entropy_",
    "dequantise",
    "grouped_",
    "lift_",
    "divisor",
    "kept",
    "load",
    "magnitude_",
    "natural_direction_",
    "natural_dots_",
    "natural_weights_",
    "plan",
    "probe_squares",
    "push_",
    "quantise",
    "rescale_",
    "rows_",
    "save_",
    "squares",
    "stochastic_bf16",
    "tangent_",
    "write_",
]
