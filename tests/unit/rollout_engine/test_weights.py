"""Weights that come over a real gloo group, from a trainer that has a default process group of its own."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlx.rollout.sglang.weight_group import (
    WeightGroupError,
    broadcast_from_trainer,
    join_weight_group,
    leave_weight_group,
)
from tests.ports import free_port
from tests.unit.rollout_engine.process import (
    REPO,
    Server,
    make_llama,
    make_qwen2,
    random_prompts,
    reference_logprobs,
    save,
    start_server,
)

TOLERANCE = 2e-5  # log-probs around -8 in fp32, summed in another order


@pytest.fixture(autouse=True)
def trainer_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trainer:
    """Rank 0 of a group with one engine."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = f"weights-{random.randrange(2**31)}"
        port = free_port()
        body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        body |= {"group_name": self.name, "backend": "gloo"}
        self.pool = ThreadPoolExecutor()
        answer = self.pool.submit(server.post, "/init_weights_update_group", body)
        self.group = join_weight_group(
            master_address="127.0.0.1",
            master_port=port,
            rank=0,
            world_size=2,
            group_name=self.name,
            backend="gloo",
            timeout_s=60,
        )
        wanted = {"success": True, "message": "Succeeded to initialize custom process group."}
        assert answer.result(60) == wanted

    def announcement(self, tensors: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
        return {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": self.name,
            "flush_cache": True,
            **more,
        }

    def send(self, tensors: dict[str, torch.Tensor], flattened: bool, **more: object) -> object:
        body = self.announcement(tensors, **more)
        payload = [tensor.contiguous() for tensor in tensors.values()]
        if flattened:
            body["load_format"] = "flattened_bucket"
            payload = [torch.cat([tensor.flatten().view(torch.uint8) for tensor in payload])]
        answer = self.pool.submit(self.server.post, "/update_weights_from_distributed", body)
        for work in [broadcast_from_trainer(tensor, self.group) for tensor in payload]:
            work.wait()
        return answer.result(60)

    def __enter__(self) -> Trainer:
        self.server.post("/begin_weight_update", {})
        return self

    def __exit__(self, *failure: object) -> None:
        """Also after a failure: other tests share the server."""
        self.server.post("/end_weight_update", {})
        answer = self.server.post("/destroy_weights_update_group", {"group_name": self.name})
        assert answer["success"] is True
        leave_weight_group(self.group)


def scores(server: Server, prompts: list[list[int]]) -> list[float]:
    body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    answers = server.post("/generate", body)
    return [row[0] for answer in answers for row in answer["meta_info"]["input_token_logprobs"][1:]]


def wanted_scores(model: PreTrainedModel, prompts: list[list[int]]) -> list[float]:
    return [value for prompt in prompts for value in reference_logprobs(model, prompt)]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("paused", [False, True])
def test_update_makes_the_engine_the_new_model(server: Server, flattened: bool, paused: bool) -> None:
    model = make_qwen2(random.randrange(2**31))
    prompts = random_prompts(model, [17, 5, 29])
    with Trainer(server) as trainer:
        before = dist.get_world_size()
        if paused:
            server.post("/pause_generation", {"mode": "abort"})
        tensors = weights(model)
        half = len(tensors) // 2
        items = list(tensors.items())
        first = trainer.send(dict(items[:half]), flattened, flush_cache=False)
        assert first == {"success": True, "message": "Succeeded to update parameter online."}
        assert server.get("/model_info")["weight_version"] == "default"
        last = trainer.send(dict(items[half:]), flattened, weight_version="7")
        assert last["message"] == "Succeeded to update parameter online. Weight version updated to 7."
        server.post("/continue_generation", {})
        assert scores(server, prompts) == pytest.approx(wanted_scores(model, prompts), abs=TOLERANCE)
        assert server.get("/model_info")["weight_version"] == "7"
        assert dist.get_world_size() == before and dist.get_backend() == "gloo"


def test_mixed_types_are_cast_and_need_no_alignment(server: Server) -> None:
    model = make_qwen2(random.randrange(2**31))
    tensors = {}
    for index, (name, tensor) in enumerate(weights(model).items()):
        tensors[name] = tensor.to((torch.bfloat16, torch.float32, torch.float16, torch.float64)[index % 4])
    tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: random.random())}
    starts = itertools.accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    assert any(start % tensor.itemsize for start, tensor in zip(starts, tensors.values(), strict=False))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    prompts = random_prompts(model, [23, 4])
    with Trainer(server) as trainer:
        assert trainer.send(tensors, True)["success"] is True
        assert scores(server, prompts) == pytest.approx(wanted_scores(model, prompts), abs=TOLERANCE)
        rows = server.post("/get_weights_by_name", {"name": "lm_head.weight", "truncate_size": 3})
        assert torch.equal(torch.tensor(rows), model.state_dict()["lm_head.weight"][:3])


@pytest.fixture
def tied_server(tmp_path: Path) -> Iterator[Server]:
    """An engine with tied embeddings that lives no longer than the pipe it was given."""
    ours, theirs = os.pipe()
    server = start_server(save(make_llama(1), tmp_path), "--parent-pipe", str(ours), pass_fds=(ours,))
    os.close(ours)
    yield server
    assert server.process.poll() is None
    os.close(theirs)
    assert server.process.wait(2) == 1
    assert any("parent process is gone" in line for line in server.log)


def test_tied_embeddings_take_updates_with_and_without_the_head(tied_server: Server) -> None:
    prompts = random_prompts(make_llama(1), [19, 3])
    with Trainer(tied_server) as trainer:
        for with_head in (False, True):
            model = make_llama(random.randrange(2**31))
            tensors = weights(model)
            if not with_head:
                del tensors["lm_head.weight"]
            assert trainer.send(tensors, True)["success"] is True
            assert scores(tied_server, prompts) == pytest.approx(wanted_scores(model, prompts), abs=TOLERANCE)


def test_announcements_that_do_not_fit_are_refused_before_the_broadcast(server: Server, qwen2: PreTrainedModel) -> None:
    good = "model.layers.1.mlp.up_proj.weight"
    fits = {good: weights(qwen2)[good]}
    with Trainer(server) as trainer:
        body = trainer.announcement(fits, weight_version="8")
        for change, says in (
            ({"names": ["model.layers.0.self_attn.qkv_proj.weight"]}, "qkv_proj"),
            ({"names": ["model.layers.3.mlp.up_proj.weight"]}, "layers.3"),
            ({"shapes": [[87, 46]]}, f"{good}' has shape [87, 46]"),
            ({"shapes": [[88, 45]]}, "the model's is [87, 45]"),
            ({"dtypes": ["torch.float32"]}, f"{good}' has dtype 'torch.float32'"),
            ({"dtypes": ["int8"]}, "int8"),
            ({"shapes": []}, "0 shapes"),
            ({"names": [good, good], "dtypes": ["float32"] * 2, "shapes": [[87, 45]] * 2}, "twice"),
            ({"load_format": "auto"}, "flattened_bucket"),
            ({"group_name": "nobody"}, "nobody"),
        ):
            answer = server.post("/update_weights_from_distributed", {**body, **change}, status=400)
            assert answer["success"] is False and says in answer["message"], answer
        assert server.get("/model_info")["weight_version"] == "default"
        prompts = random_prompts(qwen2, [12])
        assert scores(server, prompts) == pytest.approx(wanted_scores(qwen2, prompts), abs=TOLERANCE)
        # None of them joined a broadcast: the next one still finds both sides in step.
        assert trainer.send(fits, False, weight_version="9")["success"] is True
        twice = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "group_name": trainer.name}
        assert "already been created" in server.post("/init_weights_update_group", twice, status=400)["message"]
    gone = server.post("/destroy_weights_update_group", {"group_name": trainer.name}, status=400)
    assert "does not exist" in gone["message"]


DYING_TRAINER = """
import sys, torch
from rlx.rollout.sglang.weight_group import join_weight_group
group = join_weight_group(master_address="127.0.0.1", master_port=int(sys.argv[1]), rank=0, world_size=2,
                          group_name="dying", backend="gloo", timeout_s=60)
print("joined", flush=True)
sys.stdin.read()
"""


def test_the_engine_outlives_a_trainer_that_dies_in_a_broadcast(server: Server, qwen2: PreTrainedModel) -> None:
    port = free_port()
    command = [sys.executable, "-c", DYING_TRAINER, str(port)]
    process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    assert server.post("/init_weights_update_group", {**body, "group_name": "dying", "backend": "gloo"})["success"] is True
    assert process.stdout is not None and process.stdout.readline() == "joined\n"
    tensors = weights(make_qwen2(5))
    announcement = {
        "names": list(tensors),
        "dtypes": ["float32"] * len(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": "dying",
        "weight_version": "6",
    }
    server.post("/begin_weight_update", {})
    try:
        with ThreadPoolExecutor() as pool:
            update = pool.submit(server.post, "/update_weights_from_distributed", announcement, 400)
            process.kill()
            process.wait()
            answer = update.result(60)
    finally:
        server.post("/end_weight_update", {})
    assert answer["success"] is False and "no tensor was changed" in answer["message"]
    assert server.get("/model_info")["weight_version"] == "default"
    prompts = random_prompts(qwen2, [9])
    assert scores(server, prompts) == pytest.approx(wanted_scores(qwen2, prompts), abs=TOLERANCE)
    server.post("/destroy_weights_update_group", {"group_name": "dying"})
    with Trainer(server):
        pass


def test_weights_are_taken_inside_a_session_only(server: Server) -> None:
    """One that is open cannot be opened again, nor one ended that is not."""
    for path in ("/update_weights_from_distributed", "/update_weights_from_tensor", "/end_weight_update"):
        assert "no weight-update session is open" in server.post(path, {}, status=400)["error"]["message"]
    server.post("/begin_weight_update", {"selector": "target"})
    assert "already open" in server.post("/begin_weight_update", {}, status=400)["error"]["message"]
    server.post("/end_weight_update", {})


def test_from_disk_refuses_folders_that_do_not_fit(server: Server, qwen2: PreTrainedModel, tmp_path: Path) -> None:
    body = {"weight_version": "5"}
    answer = server.post("/update_weights_from_disk", {**body, "model_path": str(tmp_path)}, status=400)
    assert answer["success"] is False and str(tmp_path) in answer["message"]
    llama = save(make_llama(3), tmp_path / "llama")
    assert "shape" in server.post("/update_weights_from_disk", {**body, "model_path": str(llama)}, status=400)["message"]
    assert server.get("/model_info")["weight_version"] == "default"
    assert server.post("/update_weight_version", {"new_version": "42"})["success"] is True
    assert server.get("/model_info")["weight_version"] == "42"


def test_a_group_without_its_peers_says_who_waited_where() -> None:
    port = free_port()
    for rank in (0, 2):
        with pytest.raises(WeightGroupError, match=rf"'lonely', rank {rank} of 3, tcp://127.0.0.1:{port}: timed out after 0.5 s"):
            join_weight_group(
                master_address="127.0.0.1",
                master_port=port,
                rank=rank,
                world_size=3,
                group_name="lonely",
                backend="gloo",
                timeout_s=0.5,
            )
    with pytest.raises(ValueError, match="rank 3 of 3"):
        join_weight_group(master_address="h", master_port=1, rank=3, world_size=3, group_name="g", backend="gloo", timeout_s=1)
