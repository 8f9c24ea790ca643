"""Engines of different releases are asked what they can do: sessions of weight updates, pauses that keep requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from rlx.rollout.keys import EngineKeys, new_keys
from rlx.rollout.sglang.control import EngineControl, EngineControlError
from rlx.rollout.sglang.shared_tensors import RECEIVER
from rlx.types.weights import TensorInfo
from tests.unit.rollout_client.admin_peer import AdminPeer

INFOS = [TensorInfo(name="a", shape=(2,), dtype="float32")]


@pytest.fixture
def start() -> Iterator[Callable[..., AdminPeer]]:
    peers: list[AdminPeer] = []

    def make(*, sessions: bool = True, flushes_paused: bool = True, keys: EngineKeys | None = None) -> AdminPeer:
        peers.append(AdminPeer(sessions=sessions, flushes_paused=flushes_paused, keys=keys or new_keys()))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


def update(control: EngineControl) -> None:
    control.update_weights(INFOS, "group", flattened=True, flush_cache=False, weight_version=None)
    control.update_weights_from_tensor(["x"], load_format=RECEIVER, flush_cache=True, weight_version="3")


@pytest.mark.parametrize("sessions", [True, False])
def test_weights_are_taken_inside_a_session_where_there_are_some(start, sessions: bool) -> None:
    peer = start(sessions=sessions)
    with closing(EngineControl(peer.url, timeout_s=5, keys=peer.keys)) as control:
        control.begin_update()
        update(control)
        control.end_update()
    first, last = (["/begin_weight_update"], ["/end_weight_update"]) if sessions else ([], [])
    assert peer.paths() == [*first, "/update_weights_from_distributed", "/update_weights_from_tensor", *last]
    bodies = [body for path, body in peer.calls if path.startswith("/update")]
    # A server with a draft model would give the receiver that one as well.
    assert all(body.get("selector") == ("target" if sessions else None) for body in bodies)
    assert bodies[1].get("disable_draft_model") == (None if sessions else True)


def test_a_session_left_open_is_ended_and_begun_anew(start) -> None:
    peer = start()
    for _ in range(2):
        with closing(EngineControl(peer.url, timeout_s=5, keys=peer.keys)) as control:
            control.begin_update()
            update(control)
    assert peer.paths()[3:6] == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


@pytest.mark.parametrize("busy", [0, 3])
@pytest.mark.parametrize(
    ("sessions", "flushes_paused", "modes"),
    [
        (True, True, ["retract"]),
        (True, False, ["retract", "abort"]),
        (False, False, ["abort"]),  # a retract would lose what requests have so far
    ],
)
def test_running_requests_are_kept_where_a_paused_engine_lets_go_of_its_cache(
    start, busy: int, sessions: bool, flushes_paused: bool, modes: list[str]
) -> None:
    peer = start(sessions=sessions, flushes_paused=flushes_paused)
    peer.busy = busy
    with closing(EngineControl(peer.url, timeout_s=5, keys=peer.keys)) as control:
        control.stop()
    tried = modes if busy else modes[:1]
    assert peer.calls == [call for mode in tried for call in (("/pause_generation", {"mode": mode}), ("/flush_cache", {}))]
    assert peer.busy == (busy if flushes_paused else 0)


def test_an_engine_that_never_comes_to_rest_is_named(start) -> None:
    peer = start(flushes_paused=False)
    peer.busy = peer.immortal = 1
    says = f"engine {peer.url}: POST /flush_cache: HTTP 400: .*pending requests"
    with (
        closing(EngineControl(peer.url, timeout_s=0.1, keys=peer.keys)) as control,
        pytest.raises(EngineControlError, match=says),
    ):
        control.stop()


def test_requests_go_on_whenever_a_version_is_set(start) -> None:
    """SGLang's own default for its label is to abort them all."""
    peer = start(sessions=False)
    with closing(EngineControl(peer.url, timeout_s=5, keys=peer.keys)) as control:
        update(control)
        control.update_weights_from_disk("/nowhere", "4")
    assert [body["abort_all_requests"] for _, body in peer.calls] == [False] * 3


def test_wrong_keys_are_no_answer_to_what_an_engine_can(start) -> None:
    peer = start()
    others = EngineKeys(api_key="a", admin_key="b")
    with closing(EngineControl(peer.url, timeout_s=5, keys=others)) as control, pytest.raises(EngineControlError, match="401"):
        control.begin_update()
    with closing(EngineControl("http://127.0.0.1:9", timeout_s=5)) as control, pytest.raises(EngineControlError):
        control.begin_update()
