"""The rows that decode together, and the prompts that join them. Owned by the engine's worker thread.

Shapes: B rows, S columns, V vocabulary entries.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlx.rollout.embedded.keyvalues import KeyValues
from rlx.rollout.embedded.model import LanguageModel
from rlx.rollout.embedded.sampling import SamplingColumns, sample
from rlx.rollout.embedded.sequence import Sequence

_PREFILL_TOKENS = 16384  # padded tokens of one forward pass over prompts
_SCORED_LOGITS = 2**27  # elements of one [B, S, V] block: 512 MiB of float32


class DecodeBatch:
    """Sequences with their key/values, decoded one token at a time; rows leave when their sequence is done."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.sequences: list[Sequence] = []
        self._key_values: KeyValues | None = None
        self._columns = SamplingColumns.of([])

    def __len__(self) -> int:
        return len(self.sequences)

    def admit(self, sequences: list[Sequence]) -> list[Sequence]:
        """Run the prompts of new (or resumed) sequences and take their first token, or their scores. Returns those that are done
        by it."""
        if not self._model.info.generates:
            for chunk in _chunks(sequences, _PREFILL_TOKENS):
                _take_scores(chunk, self._model.scores([sequence.prompt for sequence in chunk]))
            return sequences
        scored = [sequence for sequence in sequences if sequence.needs_scoring]
        plain = [sequence for sequence in sequences if not sequence.needs_scoring]
        done = []
        for chunk in _chunks(scored, min(_PREFILL_TOKENS, _SCORED_LOGITS // self._model.info.vocab_size)):
            done += self._admit_chunk(chunk, True)
        for chunk in _chunks(plain, _PREFILL_TOKENS):
            done += self._admit_chunk(chunk, False)
        return done

    def step(self) -> list[Sequence]:
        """Decode one token of every row. Returns the sequences that are done by it; they have left."""
        assert self._key_values is not None
        tokens = np.array([sequence.output_ids[-1] for sequence in self.sequences], dtype=np.int64)
        logits_BV = self._model.decode(tokens, self._key_values)
        _take_tokens(self.sequences, logits_BV, self._columns, self._key_values)
        return self.drop_done()

    def drop_done(self) -> list[Sequence]:
        """Let go of the rows whose sequence is done (or was aborted from outside) and return those sequences."""
        done = [sequence for sequence in self.sequences if sequence.done]
        if done and self._key_values is not None:
            rows = [row for row, sequence in enumerate(self.sequences) if not sequence.done]
            self.sequences = [self.sequences[row] for row in rows]
            self._columns = SamplingColumns.of(self.sequences)
            if rows:
                self._key_values.select(np.array(rows, dtype=np.int64))
            else:
                self._key_values = None
        return done

    def retract(self) -> list[Sequence]:
        """Forget all key/values; returns the sequences, which keep their tokens and can be admitted again."""
        sequences, self.sequences, self._key_values = self.sequences, [], None
        for sequence in sequences:
            sequence.num_retractions += 1
        return sequences

    def _admit_chunk(self, chunk: list[Sequence], scoring: bool) -> list[Sequence]:
        # The samples of one prompt share its forward pass.
        shown = [sequence.shown() for sequence in chunk]
        unique = {prompt.name: prompt for prompt in shown}
        places = {name: place for place, name in enumerate(unique)}
        rows = np.array([places[prompt.name] for prompt in shown], dtype=np.int64)
        logits, key_values = self._model.prefill(list(unique.values()), scoring)
        if scoring:
            _score_prompts(chunk, rows, logits)
            logits = logits[:, -1]
        going = np.array([sequence.params.max_new_tokens > 0 for sequence in chunk], dtype=bool)
        for sequence, goes in zip(chunk, going, strict=True):
            if not goes and not sequence.done:
                sequence.end_by_length()
        if going.any():
            self._join([sequence for sequence, goes in zip(chunk, going, strict=True) if goes], rows[going], logits, key_values)
        return [sequence for sequence, goes in zip(chunk, going, strict=True) if not goes] + self.drop_done()

    def _join(self, newcomers: list[Sequence], rows: npt.NDArray[np.int64], logits_UV: Tensor, key_values: KeyValues) -> None:
        key_values.select(rows)
        columns = SamplingColumns.of(newcomers)
        _take_tokens(newcomers, logits_UV[torch.from_numpy(rows).to(logits_UV.device)], columns, key_values)
        if self._key_values is None:
            self._key_values = key_values
        else:
            self._key_values.join(key_values)
        self.sequences = self.sequences + newcomers
        self._columns = SamplingColumns.of(self.sequences)


def _take_tokens(sequences: list[Sequence], logits_BV: Tensor, columns: SamplingColumns, key_values: KeyValues) -> None:
    tokens_B, logprobs_B = sample(logits_BV, columns, key_values.lengths)
    for sequence, token, logprob in zip(sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
        if logprob != logprob:
            sequence.error = "the model's logits are not finite: its weights are broken"
        elif not sequence.done:
            sequence.add(token, logprob)


def _take_scores(chunk: list[Sequence], scores: list[list[float]]) -> None:
    for sequence, found in zip(chunk, scores, strict=True):
        sequence.scores = found
        if not all(map(math.isfinite, found)):
            sequence.error = "the model's scores are not finite: its weights are broken"
        else:
            sequence.end_by_length()


def _score_prompts(chunk: list[Sequence], rows: npt.NDArray[np.int64], logits_USV: Tensor) -> None:
    """Fill in ``input_logprobs`` from the logits of left-padded prompts (resumed ones carry output tokens as well)."""
    width = logits_USV.shape[1]
    for sequence, row in zip(chunk, rows.tolist(), strict=True):
        assert sequence.logprob_start is not None
        first = width - len(sequence.tokens()) + sequence.logprob_start
        targets = torch.tensor(sequence.prompt[sequence.logprob_start + 1 :], dtype=torch.int64, device=logits_USV.device)
        logits_TV = logits_USV[row, first : first + len(targets)].float()
        logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(1, targets[:, None])[:, 0]
        if not bool(logprobs_T.isfinite().all()):
            sequence.error = "the model's logits are not finite: its weights are broken"
        sequence.input_logprobs = logprobs_T.tolist()


def _chunks(sequences: list[Sequence], budget: int) -> list[list[Sequence]]:
    """Cut into forward passes of at most ``budget`` padded tokens (a longer prompt goes alone), alike lengths together."""
    chunks: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.tokens())):
        if chunks and (len(chunks[-1]) + 1) * len(sequence.tokens()) <= budget:
            chunks[-1].append(sequence)
        else:
            chunks.append([sequence])
    return chunks
