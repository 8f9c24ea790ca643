"""SGLang's ``/generate`` and ``/classify`` in JSON: requests to sequences, sequences to answers. Pure; knows no engine and no
HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlx.rollout.embedded.fields import Fields
from rlx.rollout.embedded.images import Picture, RequestImages
from rlx.rollout.embedded.model import ModelInfo
from rlx.rollout.embedded.sequence import SamplingParams, Sequence

_SEED_MASK = 2**64 - 1
_DEFAULT_NEW_TOKENS = 128
_KEYS = frozenset(
    {
        *("n", "max_new_tokens", "temperature", "top_p", "top_k", "sampling_seed", "stop_token_ids", "ignore_eos"),
        *("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"),
    }
)
# SGLang's other settings are understood at the value that switches them off.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "min_p": (0, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_new_tokens": (0, None),
    "stop": (None, [], ""),
    "stop_regex": (None, [], ""),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "custom_params": (None, {}),
    "stream_interval": (None,),
}
_NO_SAMPLING = SamplingParams(max_new_tokens=0, temperature=0.0, top_p=1.0, top_k=-1, stop_ids=frozenset(), seed=0)
_REFUSED = (
    *("stream", "input_embeds", "audio_data", "video_data", "lora_path", "lora_id", "session_params"),
    *("return_hidden_states", "return_routed_experts", "top_logprobs_num", "token_ids_logprob", "custom_logit_processor"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """``as_list``: its answer is a JSON list (several prompts, or several samples of one)."""

    sequences: list[Sequence]
    as_list: bool


class RequestParser:
    """Checks bodies against one model; ``fresh_seed`` gives the seed of requests that name none."""

    def __init__(self, info: ModelInfo, tokenizer: PreTrainedTokenizerBase | None, fresh_seed: Callable[[], int]) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._fresh_seed = fresh_seed
        self._images = None if info.vision is None else RequestImages(info.vision)

    def parse(self, body: Mapping[str, object]) -> CheckedRequest:
        """Turn a body of ``/generate`` into sequences, prompt-major. ValueError says which field is wrong and what would be
        right."""
        if not self._info.generates:
            raise ValueError("this is a reward model, which gives scores and no tokens; ask /classify")
        _check_supported(body)
        prompts, batched = self._prompts(body)
        samplings = _spread(body.get("sampling_params"), len(prompts), batched, "sampling_params")
        wants_logprobs = _spread(body.get("return_logprob"), len(prompts), batched, "return_logprob")
        starts = _spread(body.get("logprob_start_len"), len(prompts), batched, "logprob_start_len")
        rids = _rids(body, len(prompts), batched)
        sequences: list[Sequence] = []
        pictures = self._pictures(body.get("image_data"), prompts, batched)
        for index, (prompt, sampling, wants) in enumerate(zip(prompts, samplings, wants_logprobs, strict=True)):
            fields = Fields({"return_logprob": wants, "logprob_start_len": starts[index], "rid": rids[index]})
            sequences += self._samples(prompt, {} if sampling is None else sampling, fields, pictures[index])
        return _checked(sequences, batched)

    def parse_scored(self, body: Mapping[str, object]) -> CheckedRequest:
        """The same of ``/classify``: a sequence a row, which is to be read and not gone on with."""
        if self._info.generates:
            raise ValueError("this is a language model, which gives no scores; /classify asks a reward model")
        _check_supported(body)
        if body.get("image_data"):
            raise ValueError("image_data is not supported by reward models")
        rows, batched = self._prompts(body)
        sequences = []
        for row, rid in zip(rows, _rids(body, len(rows), batched), strict=True):
            if len(row) > self._info.context_length:
                raise ValueError(f"{len(row)} tokens are more than the model's context of {self._info.context_length}")
            given = Fields({"rid": rid}).text("rid", "")
            sequences.append(Sequence(rid=given or uuid.uuid4().hex, prompt=row, params=_NO_SAMPLING, return_logprob=False))
        return _checked(sequences, batched)

    def _pictures(self, image_data: object, prompts: list[list[int]], batched: bool) -> list[tuple[Picture, ...]]:
        """The images of each prompt: a list of them, or a list of lists for several prompts."""
        if not image_data:
            return [()] * len(prompts)
        if self._images is None:
            raise ValueError("image_data is not supported: the model sees no images")
        each = _spread(image_data, len(prompts), batched, "image_data") if batched else [image_data]
        return [self._images.read(images, prompt) for images, prompt in zip(each, prompts, strict=True)]

    def _prompts(self, body: Mapping[str, object]) -> tuple[list[list[int]], bool]:
        ids, text = body.get("input_ids"), body.get("text")
        if (ids is None) == (text is None):
            raise ValueError("wanted exactly one of input_ids and text")
        if text is not None:
            texts = text if isinstance(text, list) else [text]
            ids = [self._encode(one) for one in texts]
            return ids, isinstance(text, list)
        if not isinstance(ids, list) or not ids:
            raise ValueError("input_ids is empty or not a list; wanted token ids, or a list of lists of them")
        batched = isinstance(ids[0], list)
        prompts = ids if batched else [ids]
        for prompt in prompts:
            self._check_ids(prompt)
        return prompts, batched

    def _encode(self, text: object) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("text needs a tokenizer, and the model folder has none; send input_ids")
        if not isinstance(text, str):
            raise ValueError(f"text is {str(text)[:100]!r}; wanted a text or a list of texts")
        ids = [int(token) for token in self._tokenizer(text)["input_ids"]]
        self._check_ids(ids)
        return ids

    def _check_ids(self, prompt: object) -> None:
        if not isinstance(prompt, list) or not prompt:
            raise ValueError("a prompt is empty or not a list of token ids")
        for token in prompt:
            if type(token) is not int:
                raise ValueError(f"input_ids holds {str(token)[:100]!r}; wanted integers")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self._info.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids holds {wrong}, outside the vocabulary of {self._info.vocab_size} tokens")

    def _samples(self, prompt: list[int], sampling: object, fields: Fields, pictures: tuple[Picture, ...]) -> list[Sequence]:
        if not isinstance(sampling, dict):
            raise ValueError(f"sampling_params is {str(sampling)[:100]!r}; wanted an object")
        _check_keys(sampling)
        settings = Fields(sampling, "sampling_params.")
        count = settings.integer("n", 1)
        if count < 1:
            raise ValueError(f"sampling_params.n is {count}; wanted at least 1")
        params = [self._params(settings, index) for index in range(count)]
        total = len(prompt) + params[0].max_new_tokens
        if total > self._info.context_length:
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_new_tokens {params[0].max_new_tokens} make {total}, "
                f"more than the model's context of {self._info.context_length}"
            )
        wants_logprob = fields.flag("return_logprob", False)
        start: int | None = fields.integer("logprob_start_len", -1)
        assert start is not None
        if not -1 <= start < len(prompt):
            raise ValueError(f"logprob_start_len is {start}; wanted -1 to {len(prompt) - 1}, the last prompt token")
        start = start if wants_logprob and start >= 0 else None
        # As in SGLang, a given id names one answer: with several samples each gets an id of its own.
        given = fields.text("rid", "") if count == 1 else ""
        return [
            Sequence(
                rid=given or uuid.uuid4().hex,
                prompt=prompt,
                params=one,
                return_logprob=wants_logprob,
                logprob_start=start,
                pictures=pictures,
            )
            for one in params
        ]

    def _params(self, settings: Fields, index: int) -> SamplingParams:
        new_tokens = settings.integer("max_new_tokens", _DEFAULT_NEW_TOKENS)
        temperature = settings.number("temperature", 1.0)
        top_p = settings.number("top_p", 1.0)
        top_k = settings.integer("top_k", -1)
        for name, value, good, wanted in (
            ("max_new_tokens", new_tokens, new_tokens >= 0, "at least 0"),
            ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
            ("top_k", top_k, top_k == -1 or top_k >= 1, "-1 (off) or at least 1"),
        ):
            if not good:
                raise ValueError(f"sampling_params.{name} is {value}; wanted {wanted}")
        stops = settings.list_of("stop_token_ids") if settings.optional("stop_token_ids") is not None else []
        if not all(type(token) is int for token in stops):
            raise ValueError(f"sampling_params.stop_token_ids is {stops}; wanted integers")
        stop_ids = self._info.end_ids.union(token for token in stops if isinstance(token, int))
        seed = settings.optional("sampling_seed")
        return SamplingParams(
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_ids=frozenset() if settings.flag("ignore_eos", False) else stop_ids,
            seed=(self._fresh_seed() if seed is None else settings.integer("sampling_seed") + index) & _SEED_MASK,
        )


def _check_supported(body: Mapping[str, object]) -> None:
    for name in _REFUSED:
        if body.get(name):
            raise ValueError(f"{name} is not supported by the embedded engine")


def _rids(body: Mapping[str, object], count: int, batched: bool) -> list[object]:
    if batched and isinstance(body.get("rid"), str) and count > 1:
        raise ValueError("rid is one text for several prompts; wanted a list of texts")
    return _spread(body.get("rid"), count, batched, "rid")


def _checked(sequences: list[Sequence], batched: bool) -> CheckedRequest:
    if len({sequence.rid for sequence in sequences}) != len(sequences):
        raise ValueError("rid names two prompts alike; wanted different texts")
    return CheckedRequest(sequences=sequences, as_list=batched or len(sequences) > 1)


def _check_keys(sampling: Mapping[str, object]) -> None:
    for name, value in sampling.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"sampling_params.{name} is {value!r}, which the embedded engine does not support")
        elif name not in _KEYS:
            raise ValueError(f"sampling_params.{name} is unknown; known are {', '.join(sorted(_KEYS))}")


def _spread(value: object, count: int, batched: bool, name: str) -> list[object]:
    """One value a prompt, from a list of them or one for all."""
    if not isinstance(value, list):
        return [value] * count
    if not batched or len(value) != count:
        raise ValueError(f"{name} is a list of {len(value)} for {count if batched else 'a single'} prompt(s); wanted one each")
    return value


def answer(sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, object]:
    """SGLang's JSON object for one finished sequence."""
    meta: dict[str, object] = {
        "id": sequence.rid,
        "finish_reason": sequence.finish,
        "prompt_tokens": len(sequence.prompt),
        "weight_version": sequence.weight_versions[-1][0],
        "weight_versions": _stretches(sequence),
        "num_retractions": sequence.num_retractions,
        "e2e_latency": time.monotonic() - sequence.started,
        "response_sent_to_client_ts": time.time(),
    }
    if sequence.scores is not None:
        return {"embedding": sequence.scores, "meta_info": meta}
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    if sequence.return_logprob:
        meta["input_token_logprobs"] = _input_logprobs(sequence)
        meta["output_token_logprobs"] = [
            [logprob, token, None] for logprob, token in zip(sequence.output_logprobs, sequence.output_ids, strict=True)
        ]
        meta["output_token_logprobs_length"] = len(sequence.output_ids)
    result: dict[str, object] = {"output_ids": sequence.output_ids, "meta_info": meta}
    if tokenizer is not None:
        result["text"] = tokenizer.decode(_spoken(sequence), skip_special_tokens=True)
    return result


def _stretches(sequence: Sequence) -> list[dict[str, object]]:
    starts = [0, *(end for _, end in sequence.weight_versions)]
    return [
        {"version": version, "start": start, "end": end}
        for start, (version, end) in zip(starts, sequence.weight_versions, strict=False)
    ]


def _spoken(sequence: Sequence) -> list[int]:
    """The output without its stop token."""
    stopped = sequence.finish is not None and sequence.finish["type"] == "stop"
    return sequence.output_ids[:-1] if stopped else sequence.output_ids


def _input_logprobs(sequence: Sequence) -> list[list[object]]:
    if sequence.logprob_start is None or sequence.input_logprobs is None:
        return []
    ids = sequence.prompt[sequence.logprob_start :]
    return [[logprob, token, None] for logprob, token in zip([None, *sequence.input_logprobs], ids, strict=True)]
