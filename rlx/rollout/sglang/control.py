"""The admin side of one engine: pausing it, changing its weights, scoring with it. Synchronous; no sampling here.

Speaks the HTTP protocol that stock SGLang and the embedded engine share. An answer of 200 with ``success: true`` says
only that the server did not notice a mistake: what is sent must be checked before it comes here (``rlx.sync.manifest``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import httpx

from rlx.rollout.images import PlacedImages
from rlx.rollout.keys import EngineKeys
from rlx.rollout.sglang.image_request import NO_SUCH_FILE
from rlx.rollout.sglang.shared_tensors import RECEIVER
from rlx.types.weights import TensorInfo

_DRAIN_POLL_S = 0.01
_BEGIN, _END = "/begin_weight_update", "/end_weight_update"
PauseMode = Literal["abort", "retract", "in_place"]
Json = Mapping[str, object]


class EngineControlError(RuntimeError):
    """A call to an engine failed. Names the url, the call and what the server (or the connection) said.

    ``refused``: the engine is well and said no (HTTP 4xx), so that asking or starting it again cannot help.
    ``status``: of an answer that was not 200.
    """

    def __init__(self, url: str, call: str, message: str, *, refused: bool = False, status: int | None = None) -> None:
        super().__init__(f"engine {url}: {call}: {message}")
        self.url = url
        self.call = call
        self.refused = refused
        self.status = status


class EngineControl:
    """Admin calls to the engine at ``url``; each ends within about ``timeout_s`` and fails as ``EngineControlError``.

    May be used from several threads at once. ``keys`` are sent as bearer tokens, each where it belongs.
    """

    def __init__(self, url: str, *, timeout_s: float, keys: EngineKeys | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._keys = keys or EngineKeys()
        # trust_env off: a proxy meant for the internet must not carry (or refuse) cluster-internal calls.
        self._client = httpx.Client(timeout=timeout_s, trust_env=False)
        self._has_sessions: bool | None = None

    def close(self) -> None:
        self._client.close()

    def pause(self, mode: PauseMode = "abort") -> None:
        """Stop generating. ``abort`` answers every running request with what it has so far; new ones wait for ``resume``."""
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Undo ``pause``."""
        self._post("/continue_generation", {})

    def flush_cache(self) -> None:
        """Forget cached keys and values; an error while requests run."""
        self._call("POST", "/flush_cache", None)

    def stop(self) -> None:
        """Pause; when this returns nothing runs and nothing is cached.

        Requests go on by themselves after ``resume`` where a paused engine lets go of its cache. SGLang does so since it has
        sessions; before, it would lose what retracted requests have so far. Elsewhere they are answered with that, which takes
        SGLang a second.
        """
        if self._sessions():
            self.pause("retract")
            try:
                return self.flush_cache()
            except EngineControlError as error:
                if not error.refused:
                    raise
        self.pause("abort")
        self._drain()

    def _drain(self) -> None:
        """Wait until nothing is left to run. SGLang answers aborted requests a pass before its scheduler is idle, and ends itself
        when it is asked for memory or a flush with new weights in between."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                return self.flush_cache()
            except EngineControlError as error:
                if not error.refused or time.monotonic() > deadline:
                    raise
            time.sleep(_DRAIN_POLL_S)

    def model_info(self) -> Json:
        """What the engine says of its model; answers while the engine is paused, so it serves as a sign of life."""
        return self._json("GET", "/model_info", None)

    def weight_version(self) -> str:
        """The label of the weights that the engine serves ("default" until the first update)."""
        version = self.model_info().get("weight_version")
        if not isinstance(version, str):
            raise EngineControlError(self.url, "GET /model_info", f"weight_version is {version!r}, not a text")
        return version

    def init_group(
        self, master_address: str, master_port: int, *, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Let every rank of the engine join a broadcast group; returns when all of the group's ranks are there."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def destroy_group(self, group_name: str) -> None:
        """Leave and forget a broadcast group."""
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def begin_update(self) -> None:
        """Open the session inside which today's SGLang takes weights from a group or from tensors; others need none.

        One that a publication left open when it broke off is ended first.
        """
        if not self._sessions():
            return
        try:
            self._post(_BEGIN, {"selector": "target"})
        except EngineControlError as error:
            if not error.refused:
                raise
            self._post(_END, {})
            self._post(_BEGIN, {"selector": "target"})

    def end_update(self) -> None:
        """Close the session: what the engine derives from its weights is made anew."""
        if self._sessions():
            self._post(_END, {})

    def update_weights(
        self,
        infos: Sequence[TensorInfo],
        group_name: str,
        *,
        flattened: bool,
        flush_cache: bool,
        weight_version: str | None,
    ) -> None:
        """Receive ``infos`` from rank 0 of the group: one broadcast a tensor, or one flat uint8 broadcast of them all.

        Returns when the engine has loaded them. ``weight_version`` None leaves the label as it is.
        """
        body: dict[str, object] = {
            "names": [info.name for info in infos],
            "dtypes": [info.dtype for info in infos],
            "shapes": [list(info.shape) for info in infos],
            "group_name": group_name,
            "flush_cache": flush_cache,
            **self._target(),
        }
        if flattened:
            body["load_format"] = "flattened_bucket"
        self._update("/update_weights_from_distributed", body, weight_version)

    def update_weights_from_tensor(
        self, texts: Sequence[str], *, load_format: str, flush_cache: bool, weight_version: str | None
    ) -> None:
        """Load shared tensors: one text of ``rlx.rollout.sglang.shared_tensors`` for each of the engine's ranks, in their order.

        SGLang ends itself on a text that it cannot open.
        """
        body: dict[str, object] = {
            "serialized_named_tensors": list(texts),
            "load_format": load_format,
            "flush_cache": flush_cache,
            **(self._target() or {"disable_draft_model": load_format == RECEIVER}),
        }
        self._update("/update_weights_from_tensor", body, weight_version)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give GPU memory back: "kv_cache", "weights" (their values are lost). SGLang ends itself while requests run."""
        self._call("POST", "/release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again. SGLang ends itself on a tag that was not released."""
        self._call("POST", "/resume_memory_occupation", {"tags": list(tags)})

    def update_weights_from_disk(self, path: str, version: str) -> None:
        """Load a Hugging Face folder that the engine can read, and forget cached keys and values.

        SGLang says yes to a folder that lacks tensors, and ends itself on one whose shapes do not fit.
        """
        # The format is said because a server started on dummy weights would otherwise "load" dummies again.
        body = {"model_path": path, "load_format": "safetensors", "flush_cache": True}
        self._update("/update_weights_from_disk", body, version)

    def weights_by_name(self, name: str, num_rows: int) -> object:
        """The first rows of a tensor, by Hugging Face name, as nested lists of float32; an error where it cannot be had.

        A tensor-parallel engine gives the shard of its first rank.
        """
        response = self._call("GET", "/get_weights_by_name", {"name": name, "truncate_size": num_rows})
        try:
            return response.json()
        except ValueError as error:
            raise EngineControlError(self.url, "GET /get_weights_by_name", f"not JSON: {response.text[:200]}") from error

    def checksums(self) -> list[dict[str, str]] | None:
        """Of every parameter by the engine's own names, one mapping a rank; None where it gives none."""
        try:
            answer = self._post("/weights_checker", {"action": "checksum", **self._target()})
        except EngineControlError as error:
            if not error.refused:
                raise
            return None
        ranks = answer.get("ranks")
        if not isinstance(ranks, list) or not all(
            isinstance(rank, dict) and isinstance(rank["checksums"], dict) for rank in ranks
        ):
            raise EngineControlError(self.url, "POST /weights_checker", f"no checksums in {str(answer)[:200]}")
        return [rank["checksums"] for rank in ranks]

    def score(self, token_ids: Sequence[int], images: PlacedImages | None = None) -> list[float]:
        """Log-probabilities (temperature 1) of tokens 1..L-1 given the ones before: L - 1 values, of which those of placeholders
        mean nothing.

        The ids must lie inside the vocabulary: SGLang ends itself on others. Waits while the engine is paused.
        """
        sampling = {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
        body = {"input_ids": list(token_ids), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = self._json("POST", "/generate", body) if images is None else self._score_images(body, images)
        meta = answer.get("meta_info")
        rows = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        # SGLang echoes the vocabulary's last id as 0 here, beside the right log-prob.
        if not isinstance(rows, list) or not _are_echoes([row[1] for row in rows], token_ids):
            raise EngineControlError(self.url, "POST /generate", f"scored other tokens than the {len(token_ids)} sent: {rows}")
        return [float(row[0]) for row in rows[1:]]

    def _score_images(self, body: Json, images: PlacedImages) -> Json:
        """By the images' paths; by their bytes where the engine does not see the files."""
        try:
            return self._json("POST", "/generate", {**body, "image_data": images.entries(as_data=False)})
        except EngineControlError as error:
            if NO_SUCH_FILE not in str(error):
                raise
        return self._json("POST", "/generate", {**body, "image_data": images.entries(as_data=True)})

    def _target(self) -> Json:
        """The model alone: an engine with a draft model would load that one as well, and hand it to the receiver."""
        return {"selector": "target"} if self._sessions() else {}

    def _sessions(self) -> bool:
        """Whether the engine has sessions. A wrong method tells and does nothing: 405 where the path is known, 404 where not.
        SGLang says so to the api key (to the admin key it denies what it does not know), the embedded engine to the other."""
        if self._has_sessions is None:
            self._has_sessions = self._knows(_BEGIN)
        return self._has_sessions

    def _knows(self, path: str) -> bool:
        for headers in (self._keys.headers("/generate"), self._keys.headers(path)):
            try:
                self._call("GET", path, None, headers=headers)
                return True
            except EngineControlError as error:
                if error.status in (404, 405):
                    return error.status == 405
                if error.status != 401:
                    raise
                denied = error
        raise denied

    def _update(self, path: str, body: Json, version: str | None) -> None:
        """Change weights, and their label if there is one: the engine must say that it took it. Requests go on: some servers
        would abort them all unless told."""
        body = {**body, "abort_all_requests": False}
        answer = self._post(path, body if version is None else {**body, "weight_version": version})
        if version is None or f"updated to {version}." in str(answer.get("message")):
            return
        reported = self.weight_version()
        if reported != version:
            raise EngineControlError(self.url, f"POST {path}", f"the engine reports version {reported!r} instead of {version}")

    def _post(self, path: str, body: Json) -> Json:
        answer = self._json("POST", path, body)
        # Pausing answers {"status": "ok"}; everything about weights answers {"success": bool, "message": text}.
        if answer.get("success", True) is not True:
            raise EngineControlError(self.url, f"POST {path}", str(answer.get("message", answer)), refused=True)
        return answer

    def _json(self, method: str, path: str, body: Json | None) -> Json:
        response = self._call(method, path, body)
        try:
            answer = response.json()
        except ValueError as error:
            raise EngineControlError(self.url, f"{method} {path}", f"not JSON: {response.text[:200]}") from error
        if not isinstance(answer, dict):
            raise EngineControlError(self.url, f"{method} {path}", f"expected an object, got {response.text[:200]}")
        return answer

    def _call(self, method: str, path: str, body: Json | None, *, headers: dict[str, str] | None = None) -> httpx.Response:
        call = f"{method} {path}"
        headers = self._keys.headers(path) if headers is None else headers
        try:
            response = self._client.request(method, self.url + path, json=body, headers=headers)
        except httpx.TimeoutException as error:
            raise EngineControlError(self.url, call, f"no answer within {self.timeout_s:g} s ({type(error).__name__})") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineControlError(self.url, call, f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            message = f"HTTP {response.status_code}: {response.text[:2000].strip()}"
            status = response.status_code
            raise EngineControlError(self.url, call, message, refused=400 <= status < 500, status=status)
        return response


def _are_echoes(echoed: Sequence[object], sent: Sequence[int]) -> bool:
    return len(echoed) == len(sent) and all(echo in (token, 0) for echo, token in zip(echoed, sent, strict=True))
