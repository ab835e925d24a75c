"""The tokens a model is judged on, in rows like those it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .pack import IGNORE
from .tokenizer import Tokenizer


@dataclass
class EvalSet:
    """Rows of the run's packing, in file order.

    y is IGNORE where nothing is scored: with dense packing at the end of the last row, with paper packing at
    the end of every row.
    """

    x: Tensor  # (N, seq_len) int32 on the CPU
    y: Tensor  # (N, seq_len) int32
    tokens: int  # scored targets: how many of y are not IGNORE
    bytes: int  # of the text of the scored pieces
    unigram_ppl: float  # exp of the entropy of the scored targets' own frequencies


def eval_set(x: np.ndarray, y: np.ndarray, tokenizer: Tokenizer) -> EvalSet:
    """From x, y (N, seq_len) integers with at least one scored target."""
    targets = y[y != IGNORE]
    counts = np.bincount(targets)
    p = counts[counts > 0] / len(targets)
    return EvalSet(
        x=torch.from_numpy(x.astype(np.int32, copy=False)),
        y=torch.from_numpy(y.astype(np.int32, copy=False)),
        tokens=len(targets),
        bytes=int(tokenizer.byte_lengths[targets].sum(dtype=np.int64)),
        unigram_ppl=float(np.exp(-(p * np.log(p)).sum())),
    )


def first(
    documents: Generator[np.ndarray, None, None],
    limit: int,
    worth: Callable[[int], int],  # what a document of so many tokens counts
) -> list[np.ndarray]:
    """The first documents, up to and with the one that makes their worth `limit`; closes the generator."""
    found, size = [], 0
    with closing(documents):
        for tokens in documents:
            found.append(tokens)
            size += worth(len(tokens))
            if size >= limit:
                break
    return found
