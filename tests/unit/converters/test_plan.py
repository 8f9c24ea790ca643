"""Plans: every weight once, in the right rank's file; and the commands that start no Megatron."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from converters.__main__ import main
from converters.journal import Output
from converters.plan import Layout, Part, bytes_by_rank, file_plans, layout_problems, parameters
from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import architecture_of

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
}  # fmt: skip


def arch_of(**changes: Any) -> Architecture:
    config = CONFIG | changes
    return architecture_of(config)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=8, pp=4, etp=8), Layout(tp=2, pp=3, etp=2), Layout(tp=16, etp=16)])
def test_every_weight_is_moved_once(layout: Layout) -> None:
    arch = arch_of(vocab_size=128257)  # does not divide
    parts: dict[tuple[str, ...], list[Part]] = {}
    for plan in file_plans(arch, layout, lambda parameter: 2):
        for part in plan.parts:
            parts.setdefault(part.parameter.hf_names, []).append(part)
    assert parts.keys() == {parameter.hf_names for parameter in parameters(arch)}
    for names, found in parts.items():
        assert sorted(part.shard.rank for part in found) == list(range(found[0].shard.size)), names


def test_ranks_get_their_layers_and_equal_shares() -> None:
    arch = arch_of()
    plans = file_plans(arch, Layout(tp=8, pp=4, etp=8), lambda parameter: 2)
    for plan in plans:
        for part in plan.parts:
            if part.parameter.layer is not None:
                assert plan.rank // 8 == part.parameter.layer // 20
    shares = bytes_by_rank(plans, lambda parameter: 2)
    assert set(shares) == set(range(32))
    total = sum(2 * math.prod(shape) for parameter in parameters(arch) for shape in parameter.hf_shapes)
    assert sum(shares.values()) == total and total == 2 * 70_553_706_496
    assert max(shares.values()) < 1.15 * total / 32
    assert all(sum(part.num_elements for part in plan.parts) * 2 <= 2**30 for plan in plans)


def test_layouts_that_do_not_fit() -> None:
    arch = arch_of()
    assert "64 attention heads" in next(layout_problems(arch, Layout(tp=3)))
    assert "6 key-value heads" in next(
        layout_problems(arch_of(num_attention_heads=48, num_key_value_heads=6, head_dim=128), Layout(tp=4))
    )
    assert "80 layers" in next(layout_problems(arch, Layout(pp=81)))
    assert "dense" in next(layout_problems(arch, Layout(ep=2)))
    assert "--pp must be at least 1" in next(layout_problems(arch, Layout(pp=0)))


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    argv = ["hf-to-megatron", "--hf", str(tmp_path), "--out", str(tmp_path / "out"), "--dry-run", "--tp", "8", "--pp", "4"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "70.55 billion weights" in text and "rank 31: " in text and "estimated time" in text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_missing_companions_and_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*more: str, hf: str = str(tmp_path)) -> tuple[int, str]:
        code = main(["hf-to-megatron", "--hf", hf, "--out", str(tmp_path / "out"), *more])
        return code, capsys.readouterr().err

    code, text = refused()
    assert code == 2 and "config.json" in text and "--config" in text
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, text = refused()
    assert code == 2 and "tokenizer.json" in text and "--tokenizer" in text
    code, text = refused(hf=str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere" in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, text = refused(hf="some-one/some-model")
    assert code == 1 and "some-one/some-model" in text and "hub" in text
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    code, text = refused("--dry-run")
    assert code == 2 and "mamba" in text and "MambaForCausalLM" in text and "qwen2" in text


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Output(out, "plan", resume=False)
    for name in ("a", "b"):
        (first.folder / name).write_text(name)
        first.note(name, [name])
    with pytest.raises(ValueError, match="another conversion"):
        Output(out, "plan", resume=True)
    first.release()
    (first.folder / "b").write_text("longer than noted")
    second = Output(out, "plan", resume=True)
    assert second.done == {"a": ["a"]} and not out.exists()
    second.release()
    with pytest.raises(ValueError, match="--resume"):
        Output(out, "another plan", resume=True)
    third = Output(out, "plan", resume=False)
    assert third.done == {}
    with third:
        third.finish()
    assert list(out.iterdir()) == [] and not third.folder.exists()
