"""One answer of an engine, as it was parsed and joined; what leaves this package is a trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.types.rollout import FinishReason, ImageSpan, Segment, Trajectory, sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens that an engine sampled, stop token included, each with its log-prob and the weights that wrote it."""

    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_versions: tuple[int, ...]

    def after(self, prompt: Segment, images: tuple[ImageSpan, ...] = ()) -> Trajectory:
        """The trajectory of a single turn. ``images`` stand in the prompt."""
        segments = sampled(self.token_ids, self.rollout_logprobs, self.weight_versions)
        return Trajectory(segments=(prompt, *segments), finish_reason=self.finish_reason, images=images)
