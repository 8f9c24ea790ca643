"""Engine command lines and waiting for health."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, SyncConfig
from rlx.rollout.server import engine_command, parse_ready_port, wait_until_healthy
from rlx.rollout.sglang.answers import EngineError
from rlx.rollout.sglang.server import SGLangSite, image_environment, sglang_command
from tests.unit.rollout_client.peer import Peer


def config_of(**rollout: object) -> Config:
    return Config(
        cluster=ClusterConfig(device="cpu", threads_per_rank=3),
        sync=SyncConfig(timeout_s=77.0),
        model=ModelConfig(path="/models/tiny", dtype="bf16"),
        data=DataConfig(train="t.jsonl"),
        reward=RewardConfig(name="exact"),
        rollout=RolloutConfig(**rollout),  # type: ignore[arg-type]
    )


def test_command_of_an_embedded_engine() -> None:
    arguments = {"max_running": 4096, "await_weights": True, "enable_fp32_lm_head": False, "seed": None}
    config = config_of(num_engines=2, server_args=arguments)
    got = engine_command(EngineSettings.of(config), index=1, port=0, python="/v/python", parent_pipe=7)
    want = "/v/python -m rlx.cli.serve --model /models/tiny --port 0 --dtype bf16"
    want += " --rank 1 --device cpu --weight-timeout-s 77.0 --threads 3 --parent-pipe 7"
    assert got == [*want.split(), "--max-running", "4096", "--await-weights"]


def test_the_engine_may_have_a_dtype_of_its_own() -> None:
    got = engine_command(EngineSettings.of(config_of(dtype="fp32")), index=0, port=123, python="py", parent_pipe=None)
    assert got[got.index("--dtype") + 1] == "fp32" and got[got.index("--port") + 1] == "123" and "--parent-pipe" not in got
    got = engine_command(EngineSettings.of(config_of()), index=0, port=1, python="py", parent_pipe=None)
    assert got[got.index("--dtype") + 1] == "bf16"


def sglang_words(config: Config) -> list[str]:
    site = SGLangSite(index=0, device="cpu", host="127.0.0.1", port=1, key_file=Path("keys"), python="py")
    return sglang_command(EngineSettings.of(config), site)


@pytest.mark.parametrize(
    "command",
    [sglang_words, lambda config: engine_command(EngineSettings.of(config), index=0, port=1, python="py", parent_pipe=None)],
)
def test_engines_in_bf16_keep_logits_in_fp32_as_the_trainers_do(command: Callable[[Config], list[str]]) -> None:
    config = config_of()
    assert "--enable-fp32-lm-head" not in command(config)
    on = replace(config, model=replace(config.model, fp32_head=True))
    assert "--enable-fp32-lm-head" in command(on)
    assert "--enable-fp32-lm-head" not in command(replace(on, rollout=replace(on.rollout, dtype="fp32")))


@pytest.mark.parametrize(
    ("prompts", "engines", "given", "wanted"),
    [(8, 2, {}, ["--cuda-graph-max-bs-decode", "16"]), (65, 1, {}, []), (8, 2, {"cuda_graph_max_bs": 64}, [])],
)
def test_graphs_are_captured_for_the_sizes_that_occur(
    prompts: int, engines: int, given: dict[str, int], wanted: list[str]
) -> None:
    config = config_of(engine="sglang", num_engines=engines, samples_per_prompt=4, server_args=given)
    config = replace(config, data=replace(config.data, prompts_per_step=prompts), cluster=replace(config.cluster, device="cuda"))
    site = SGLangSite(index=0, device="cuda", host="h", port=1, key_file=Path("k"), python="p")
    words = sglang_command(EngineSettings.of(config), site)
    found = [words[at : at + 2] for at, word in enumerate(words) if word == "--cuda-graph-max-bs-decode"]
    assert found == ([wanted] if wanted else [])


def test_a_server_argument_wins_over_the_fp32_head() -> None:
    config = config_of(server_args={"enable_fp32_lm_head": False})
    assert "--enable-fp32-lm-head" not in sglang_words(replace(config, model=replace(config.model, fp32_head=True)))


@pytest.mark.parametrize("name", ["port", "parent_pipe", "parent-pipe", "model", "dtype"])
def test_arguments_of_our_own_cannot_be_overridden(name: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.server_args\.{name.replace('-', '_')}"):
        engine_command(EngineSettings.of(config_of(server_args={name: 1})), index=0, port=0, python="py", parent_pipe=None)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.2"):
        engine_command(EngineSettings.of(config_of(num_engines=3)), index=3, port=0, python="py", parent_pipe=None)


@pytest.mark.parametrize(
    ("line", "port"),
    [
        ("rlx-serve ready port=40123\n", 40123),
        ("rlx-serve ready port=1", 1),
        ("2026 rlx-serve ready port=40123", None),
        ("rlx-serve ready port=", None),
        ("rlx-serve ready port=12x", None),
        ("", None),
    ],
)
def test_ready_line(line: str, port: int | None) -> None:
    assert parse_ready_port(line) == port


def test_waits_until_the_engine_is_well(start_peer: Callable[..., Peer]) -> None:
    peer = start_peer()
    peer.healthy = False
    asked = 0

    def alive() -> bool:
        nonlocal asked
        asked += 1
        peer.healthy = asked > 3
        return True

    wait_until_healthy(peer.url, 20, alive, lambda: "")
    assert asked == 4


def test_a_dead_process_ends_the_wait_with_its_log() -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"ended before it was healthy.*\nboom") as caught:
        wait_until_healthy("http://127.0.0.1:9", 60, lambda: False, lambda: "boom\n")
    assert time.monotonic() - began < 5 and not caught.value.retryable


def test_never_healthy(start_peer: Callable[..., Peer]) -> None:
    peer = start_peer()
    peer.healthy = False
    with pytest.raises(EngineError, match=r"not healthy within 0\.5 s \(last: HTTP 503\)[\s\S]*loading"):
        wait_until_healthy(peer.url, 0.5, lambda: True, lambda: "loading")
    peer.close()
    with pytest.raises(EngineError, match="refused"):
        wait_until_healthy(peer.url, 0.3, lambda: True, lambda: "")


def test_a_server_of_a_model_with_a_tower_takes_images_beside_ids(tmp_path: Path) -> None:
    """What SGLang keeps of images is right as long as the receiver clears it, or the tower stays as it is."""
    config = config_of(engine="sglang")
    assert "--disable-fast-image-processor" not in sglang_words(config) and image_environment(EngineSettings.of(config)) == {}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {"depth": 1}}')
    config = replace(config, model=replace(config.model, path=str(tmp_path)))
    assert "--disable-fast-image-processor" in sglang_words(config)
    package = {"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "rlx_images"}
    assert image_environment(EngineSettings.of(config)) == package
    disk = replace(config, sync=replace(config.sync, transport="disk"))
    assert image_environment(EngineSettings.of(disk)) == package
    learning = replace(disk, model=replace(disk.model, vision="train"))
    assert image_environment(EngineSettings.of(learning)) == package | {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    assert image_environment(EngineSettings.of(replace(learning, sync=replace(config.sync, transport="stream")))) == package
