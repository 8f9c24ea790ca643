"""The router of a mixture of experts: which experts a token goes to, with what weights, and the balancing losses.

Megatron's router groups experts and weighs its losses in its own way; this one follows the families' published formulas
(``Experts``), computes in fp32, and balances sequence by sequence (DeepSeek-AI 2024, "sequence-wise auxiliary loss"), so
that no layout and no packing changes a gradient. Legend: t tokens of this rank, E experts, S sequences of the pack.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from rlx.arch.architecture import Experts
from rlx.parallel.packing import PackedSequences


class RoutedLayer(TransformerLayer):
    """A transformer layer that shows its router the pack before it runs, in a recomputation too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        router = getattr(self.mlp, "router", None)
        if router is not None:
            router.pack = kwargs.get("packed_seq_params")
        return super().forward(*args, **kwargs)


class Router(TopKRouter):
    """``experts`` says how scores become choices; the coefficients weigh the balancing loss and the z-loss (Zoph et al. 2022).

    The choice goes through Megatron's ``router_replay`` where one is set.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        experts: Experts,
        aux_coefficient: float,
        z_coefficient: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.experts, self.aux_coefficient, self.z_coefficient = experts, aux_coefficient, z_coefficient
        self.pack: PackedSequences | None = None
        if experts.score_bias:
            # Held still: what moves it in pretraining is not a gradient.
            bias = torch.zeros(experts.num_experts, dtype=torch.float32, device=torch.cuda.current_device())
            self.__dict__.pop("expert_bias", None)  # Megatron's None, which would hide the parameter
            self.expert_bias: Tensor = nn.Parameter(bias, requires_grad=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [t, 1, E] -> weights [t, E], zero where not chosen, and the choice, bool [t, E]."""
        logits = logits.view(-1, self.experts.num_experts).float()
        scores = torch.softmax(logits, dim=-1) if self.experts.score == "softmax" else torch.sigmoid(logits)
        rated = scores.detach() + self.expert_bias if self.experts.score_bias else scores.detach()
        chosen = self._choose(rated)
        weights = scores.gather(1, chosen)
        if self.experts.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        sparse = torch.zeros_like(scores).scatter(1, chosen, weights * self.experts.scale)
        routed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        if self.training and torch.is_grad_enabled() and (self.aux_coefficient or self.z_coefficient):
            sparse = _WithLoss.apply(sparse, self._balancing_loss(logits, scores, routed))  # type: ignore[no-untyped-call]
        return sparse, routed

    def _choose(self, rated: Tensor) -> Tensor:
        """The numbers of the chosen experts, [t, top_k]."""
        experts = self.experts

        def top(rated: Tensor, top_k: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if experts.num_groups > 1:
                groups = rated.view(-1, experts.num_groups, experts.num_experts // experts.num_groups)
                ratings = groups.topk(experts.group_rating, dim=-1).values.sum(dim=-1)
                best = ratings.topk(experts.top_groups, dim=-1).indices
                left_out = torch.ones_like(ratings, dtype=torch.bool).scatter(1, best, False)
                rated = groups.masked_fill(left_out[..., None], -torch.inf).flatten(1)
            values, indices = rated.topk(top_k, dim=-1)
            return values, indices

        if self.router_replay is None:
            return top(rated, experts.top_k)[1]
        replayed: Tensor = self.router_replay.get_replay_topk(rated, experts.top_k, None, None, top)[1]
        return replayed

    def _balancing_loss(self, logits: Tensor, scores: Tensor, routed: Tensor) -> Tensor:
        """This rank's part of the sum over sequences of weight x (aux + z): summed over TP and CP it is the whole.

        For a sequence of n tokens, aux = E sum_i f_i P_i with f_i the share of its choices that fell on expert i and P_i
        its mean score, and z = mean log(sum exp(logits))^2.
        """
        pack = self.pack
        assert pack is not None and pack.segments_t is not None, "a routed layer was run without its pack"
        assert pack.lengths_S is not None and pack.weights_S is not None
        segments_t, lengths_S, weights_S = pack.segments_t, pack.lengths_S, pack.weights_S
        if self.config.sequence_parallel:
            segments_t = segments_t.chunk(self.tp_group.size())[self.tp_group.rank()]
        inside = segments_t >= 0
        segments, num_sequences = segments_t[inside], len(lengths_S)
        per_token = weights_S[segments] / lengths_S[segments]
        loss = logits.new_zeros(())
        if self.z_coefficient:
            loss = loss + self.z_coefficient * (per_token * logits[inside].logsumexp(dim=-1) ** 2).sum()
        if self.aux_coefficient:
            choices = logits.new_zeros(num_sequences, self.experts.num_experts)
            choices.index_add_(0, segments, routed[inside].float())
            dist.all_reduce(choices, group=self.tp_cp_group if self.config.sequence_parallel else self.cp_group)
            shares = choices / (lengths_S[:, None] * self.experts.top_k)
            probabilities = scores[inside]
            if self.experts.score == "sigmoid":
                probabilities = probabilities / (probabilities.sum(dim=-1, keepdim=True) + 1e-20)
            imbalance = self.experts.num_experts * (shares[segments] * probabilities).sum(dim=-1)
            loss = loss + self.aux_coefficient * (per_token * imbalance).sum()
        return loss


class _WithLoss(torch.autograd.Function):
    """Passes ``tensor`` on; in the backward pass ``loss`` gets a gradient of 1, as if it stood in the sum that is derived."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())
