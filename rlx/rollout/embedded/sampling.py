"""Choosing the next tokens of a whole batch at once.

Shapes: B rows, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlx.rollout.embedded.draws import uniform_draws
from rlx.rollout.embedded.sequence import Sequence

_MAX_ELEMENTS = 2**25  # of one [rows, V] float64 block: 256 MiB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingColumns:
    """The sampling settings of a batch as columns [B]."""

    temperatures: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> SamplingColumns:
        params = [sequence.params for sequence in sequences]
        return cls(
            temperatures=np.array([p.temperature for p in params], dtype=np.float32),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            top_k=np.array([p.top_k for p in params], dtype=np.int64),
            seeds=np.array([p.seed for p in params], dtype=np.uint64),
        )

    def slice(self, rows: slice) -> SamplingColumns:
        return SamplingColumns(
            temperatures=self.temperatures[rows], top_p=self.top_p[rows], top_k=self.top_k[rows], seeds=self.seeds[rows]
        )


def sample(logits_BV: Tensor, columns: SamplingColumns, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Next tokens [B] int64 and their log-probs [B] float32, given the position each token will have.

    The log-prob is that of log_softmax(logits / temperature) over the whole vocabulary, before top-p and top-k; greedy
    rows (temperature 0) report the raw one. A row whose logits are not finite gets log-prob NaN.
    """
    rows = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    if logits_BV.shape[0] <= rows:
        return _sample_block(logits_BV, columns, positions)
    blocks = [slice(start, start + rows) for start in range(0, logits_BV.shape[0], rows)]
    parts = [_sample_block(logits_BV[block], columns.slice(block), positions[block]) for block in blocks]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _sample_block(logits_BV: Tensor, columns: SamplingColumns, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    greedy = columns.temperatures == 0
    logits_BV = logits_BV.float()
    if (~greedy & (columns.temperatures != 1)).any():
        divisors = torch.from_numpy(np.where(greedy, np.float32(1), columns.temperatures)).to(logits_BV.device)
        logits_BV = logits_BV / divisors[:, None]
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    if greedy.all():
        tokens_B = logprobs_BV.argmax(dim=-1)
    else:
        tokens_B = _draw(logprobs_BV.exp(), columns, positions)
        if greedy.any():
            tokens_B = torch.where(torch.from_numpy(greedy).to(tokens_B.device), logprobs_BV.argmax(dim=-1), tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _draw(probs_BV: Tensor, columns: SamplingColumns, positions: npt.NDArray[np.int64]) -> Tensor:
    """Invert the cumulative distribution at one counter-based draw a row."""
    truncated = np.flatnonzero((columns.top_p < 1) | (columns.top_k > 0))
    if truncated.size:
        rows = torch.from_numpy(truncated).to(probs_BV.device)
        probs_BV[rows] = _truncate(probs_BV[rows], columns.top_p[truncated], columns.top_k[truncated])
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    draws_B = torch.from_numpy(uniform_draws(columns.seeds, positions)).to(probs_BV.device)
    # The first entry ABOVE the target always has a probability greater than zero.
    tokens_B = torch.searchsorted(cumulative_BV, (draws_B * cumulative_BV[:, -1])[:, None], right=True)[:, 0]
    return tokens_B.clamp_(max=probs_BV.shape[1] - 1)  # reached by rows of NaN only


def _truncate(probs_RV: Tensor, top_p: npt.NDArray[np.float64], top_k: npt.NDArray[np.int64]) -> Tensor:
    """Zero what lies outside the nucleus (Holtzman et al. 2020) or the top k; both are judged on the full distribution."""
    sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1, dtype=torch.float64) - sorted_RV
    ranks_V = torch.arange(probs_RV.shape[1], device=probs_RV.device)
    limits_R = torch.from_numpy(np.where(top_k > 0, top_k, probs_RV.shape[1])).to(probs_RV.device)
    kept_RV = (before_RV <= torch.from_numpy(top_p).to(probs_RV.device)[:, None]) & (ranks_V < limits_R[:, None])
    return torch.zeros_like(probs_RV).scatter_(1, order_RV, sorted_RV * kept_RV)
