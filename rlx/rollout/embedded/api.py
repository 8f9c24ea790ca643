"""SGLang's HTTP endpoints over an ``Engine``. Handlers run in the event loop and never touch the model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlx.rollout.embedded.engine import PAUSE_MODES, Engine
from rlx.rollout.embedded.fields import Fields
from rlx.rollout.embedded.protocol import CheckedRequest, RequestParser, answer
from rlx.rollout.embedded.weights import UpdatePlan, WeightStore

Handler = Callable[[Request], Awaitable[Response]]
_HEALTH_LIMIT_S = 20.0  # SGLang's
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class Api:
    """The endpoints. ``app`` is the ASGI application."""

    def __init__(self, engine: Engine, weights: WeightStore, parser: RequestParser, max_running: int) -> None:
        self._engine = engine
        self._weights = weights
        self._parser = parser
        self._max_running = max_running
        self._live_rids: set[str] = set()
        self._released: set[str] = set()
        self._updating = False
        self.app = Starlette(routes=self._routes())

    def _routes(self) -> list[Route]:
        reads: dict[str, Handler] = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/get_model_info": self.model_info,
            "/model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_server_info": self.server_info,
        }
        writes: dict[str, Handler] = {
            "/generate": self.generate,
            "/classify": self.classify,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/abort_request": self.abort,
            "/slow_down": self.slow_down,
            "/begin_weight_update": self.begin_update,
            "/end_weight_update": self.end_update,
            "/init_weights_update_group": self.init_group,
            "/destroy_weights_update_group": self.destroy_group,
            "/update_weights_from_distributed": self.update_from_group,
            "/update_weights_from_tensor": self.update_from_tensor,
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weight_version": self.update_version,
            "/release_memory_occupation": self.release,
            "/resume_memory_occupation": self.reload,
        }
        both: dict[str, Handler] = {"/flush_cache": self.flush, "/get_weights_by_name": self.weights_by_name}
        return (
            [Route(path, _guarded(handler), methods=["GET"]) for path, handler in reads.items()]
            + [Route(path, _guarded(handler), methods=["POST", "PUT"]) for path, handler in writes.items()]
            + [Route(path, _guarded(handler), methods=["GET", "POST"]) for path, handler in both.items()]
        )

    # -- generating ------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        return await self._answer(request, self._parser.parse(await _body(request)))

    async def classify(self, request: Request) -> Response:
        return await self._answer(request, self._parser.parse_scored(await _body(request)))

    async def _answer(self, request: Request, parsed: CheckedRequest) -> Response:
        if self._engine.released:
            raise ValueError("the weights are released (/release_memory_occupation); resume them first")
        rids = {sequence.rid for sequence in parsed.sequences}
        if rids & self._live_rids:
            raise ValueError(f"rid {min(rids & self._live_rids)!r} is in use by a request in flight")
        self._live_rids |= rids
        try:
            await self._until_done(request, self._engine.submit(parsed.sequences), rids)
        finally:
            self._live_rids -= rids
        for sequence in parsed.sequences:
            if sequence.error is not None:
                return _error(sequence.error, 500)
        answers = [answer(sequence, self._engine.model.tokenizer) for sequence in parsed.sequences]
        return JSONResponse(answers if parsed.as_list else answers[0])

    async def _until_done(self, request: Request, future: Future[None], rids: set[str]) -> None:
        """Wait for the answers, or abort the sequences when the client hangs up first."""
        done = asyncio.wrap_future(future)
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not done.done():
                with suppress(RuntimeError):  # the engine is closing and aborts everything itself
                    for rid in rids:
                        self._engine.abort(rid)
        await done

    async def pause(self, request: Request) -> Response:
        mode = Fields(await _body(request)).text("mode", "abort")
        if mode not in PAUSE_MODES:
            raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(PAUSE_MODES)}")
        await asyncio.wrap_future(self._engine.pause(mode))
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: Request) -> Response:
        await asyncio.wrap_future(self._engine.resume())
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        everything, rid = fields.flag("abort_all", False), fields.text("rid", "")
        if everything or rid:
            await asyncio.wrap_future(self._engine.abort(None if everything else rid))
        return Response(status_code=200)

    async def slow_down(self, request: Request) -> Response:
        self._engine.step_delay_s = Fields(await _body(request)).number("forward_sleep_time", 0.0)
        return Response(status_code=200)

    async def flush(self, request: Request) -> Response:
        # No key or value outlives its request here, so that only SGLang's refusal while requests run is left to do.
        return PlainTextResponse(_FLUSHED, 200 if self._engine.is_idle else 400)

    # -- what it is ------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self._engine.alive else 503)

    async def health_generate(self, request: Request) -> Response:
        """Generates one token (or scores one), unless generation is paused: then being alive is all that can be asked."""
        if self._engine.alive and not self._engine.paused and not self._engine.released:
            parse = self._parser.parse if self._engine.info.generates else self._parser.parse_scored
            probe = parse({"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}})
            done, _ = await asyncio.wait({asyncio.wrap_future(self._engine.submit(probe.sequences))}, timeout=_HEALTH_LIMIT_S)
            if not done:
                return Response(status_code=503)
        return await self.health(request)

    async def model_info(self, request: Request) -> Response:
        info = self._engine.info
        return JSONResponse(
            {
                "model_path": info.path,
                "tokenizer_path": info.path,
                "is_generation": info.generates,
                "preferred_sampling_params": None,
                "weight_version": self._engine.weight_version,
                "has_image_understanding": info.vision is not None,
                "has_audio_understanding": False,
                "model_type": info.model_type,
                "architectures": list(info.architectures),
                "vocab_size": info.vocab_size,
                "context_length": info.context_length,
            }
        )

    async def server_info(self, request: Request) -> Response:
        info = self._engine.info
        return JSONResponse(
            {
                "engine": "rlx-embedded",
                "model_path": info.path,
                "dtype": info.dtype,
                "device": info.device,
                "tp_size": 1,
                "dp_size": 1,
                "pp_size": 1,
                "context_length": info.context_length,
                "max_running_requests": self._max_running,
                "weight_version": self._engine.weight_version,
                "paused": self._engine.paused,
                "num_in_flight": self._engine.in_flight,
            }
        )

    async def weights_by_name(self, request: Request) -> Response:
        fields = Fields({**request.query_params, **(await _body(request))})
        count = int(str(fields.optional("truncate_size") or 100))
        name = fields.text("name")
        return JSONResponse(await asyncio.wrap_future(self._engine.call(lambda: self._weights.rows(name, count))))

    # -- new weights -----------------------------------------------------------------------------------------------

    async def begin_update(self, request: Request) -> Response:
        if self._updating:
            raise ValueError("a weight-update session is already open; end it first")
        self._updating = True
        return JSONResponse({"success": True, "message": "Success"})

    async def end_update(self, request: Request) -> Response:
        self._check_session("/end_weight_update")
        self._updating = False
        return JSONResponse({"success": True, "message": "Success"})

    def _check_session(self, path: str) -> None:
        if not self._updating:
            raise ValueError(f"no weight-update session is open; {path} needs /begin_weight_update before it")

    async def init_group(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        # A thread of its own: the peers may be long in coming, and the engine serves meanwhile.
        return await _success(_in_thread(lambda: self._weights.join_group(fields)), _JOINED)

    async def destroy_group(self, request: Request) -> Response:
        name = Fields(await _body(request)).text("group_name", "weight_update_group")
        return await _success(self._engine.call_exclusive(lambda: self._weights.leave_group(name)), _DESTROYED)

    async def update_from_group(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        self._check_session("/update_weights_from_distributed")
        try:
            plan: UpdatePlan = self._weights.plan(fields)
        except ValueError as error:
            return _refused(error)
        return await self._update(fields, lambda: self._weights.receive(plan), "Succeeded to update parameter online.")

    async def update_from_tensor(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        self._check_session("/update_weights_from_tensor")

        def load() -> None:
            self._weights.load_shared(fields)

        return await self._update(fields, load, "Success")

    async def update_from_disk(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        path = fields.text("model_path")

        def load() -> None:
            self._weights.load_folder(Path(path))
            self._engine.info = self._engine.info.at(path)

        return await self._update(fields, load, "Succeeded to update model weights.", num_paused_requests=0)

    async def _update(self, fields: Fields, load: Callable[[], None], message: str, **more: object) -> Response:
        version = fields.text("weight_version", "")

        def update() -> None:
            load()
            if version:
                self._engine.relabel(version)

        future = self._engine.call_exclusive(update, fields.flag("abort_all_requests", False))
        return await _success(future, f"{message} Weight version updated to {version}." if version else message, **more)

    async def update_version(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        version = fields.text("new_version")
        if fields.flag("abort_all_requests", True):
            await asyncio.wrap_future(self._engine.abort(None))
        await asyncio.wrap_future(self._engine.call(lambda: self._engine.relabel(version)))
        message = f"Weight version updated to {version}"
        return JSONResponse({"success": True, "message": message, "new_version": version})

    async def release(self, request: Request) -> Response:
        tags = _tags(Fields(await _body(request)))
        if not self._engine.is_idle:
            raise ValueError("requests are in flight; pause with mode retract or abort first")
        self._released |= tags
        if "weights" in tags:
            self._engine.released = self._engine.model.device.type == "cuda"
            await asyncio.wrap_future(self._engine.call_exclusive(self._engine.model.offload))
        return JSONResponse(None)

    async def reload(self, request: Request) -> Response:
        tags = _tags(Fields(await _body(request)))
        if not tags <= self._released:  # SGLang ends itself
            raise ValueError(f"{', '.join(sorted(tags - self._released))} was not released; released: {sorted(self._released)}")
        if "weights" in tags:
            await asyncio.wrap_future(self._engine.call_exclusive(self._engine.model.reload))
            self._engine.released = False
        self._released -= tags
        return JSONResponse(None)


# Nothing is kept of a request that is done, and there are no CUDA graphs: releasing those two changes nothing.
_TAGS = ("weights", "kv_cache", "cuda_graph")
_JOINED = "Succeeded to initialize custom process group."
_DESTROYED = "Succeeded to destroy custom process group."


def _guarded(handler: Handler) -> Handler:
    """Turn a ValueError (the request is wrong) into 400 and an engine that is gone into 503."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except ValueError as error:
            return _error(str(error), 400)
        except RuntimeError as error:
            return _error(str(error), 503)

    return run


async def _body(request: Request) -> dict[str, object]:
    raw = await request.body()
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("the body is not a JSON object")
    return body


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _success(future: Future[None], message: str, **more: object) -> Response:
    """SGLang's answer to admin calls: success and a message, 400 with the reason otherwise."""
    try:
        await asyncio.wrap_future(future)
    except (ValueError, RuntimeError, OSError) as error:
        return _refused(error)
    return JSONResponse({"success": True, "message": message, **more})


def _tags(fields: Fields) -> set[str]:
    """The kinds of memory that a request is about; all when it names none."""
    named = fields.list_of("tags") if fields.optional("tags") else list(_TAGS)
    unknown = [tag for tag in named if tag not in _TAGS]
    if unknown:
        raise ValueError(f"tags has {unknown[0]!r}; wanted some of {', '.join(_TAGS)}")
    return {str(tag) for tag in named}


def _refused(error: Exception) -> Response:
    return JSONResponse({"success": False, "message": str(error)}, status_code=400)


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


def _in_thread(function: Callable[[], None]) -> Future[None]:
    """Run in a daemon thread: one that waits for peers who never come must not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future
