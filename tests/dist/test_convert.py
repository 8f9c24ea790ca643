"""The converter on real checkpoints: bit for bit there and back, in any layout, and what it says of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist.checkpoints import make_llama, make_qwen2
from tests.dist.launch import ROOT, run_ranks

LAYOUT = ["--tp", "2", "--pp", "3"]  # four layers over three stages
MIXTURES = ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"]
MIXTURE_LAYOUT = ["--tp", "2", "--pp", "2", "--ep", "2", "--etp", "1"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def digest(folder: Path) -> str:
    parts = [file.name.encode() + file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


def most_common_type(folder: Path) -> str:
    sizes: Counter[torch.dtype] = Counter()
    for value in tensors_of(folder).values():
        sizes[value.dtype] += value.numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def variant(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a single-file checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = tensors_of(source)
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, target / "model.safetensors")
    return target


def to_bf16(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: value.bfloat16() for name, value in tensors.items()})
    # Patterns that arithmetic would not keep: a negative zero, infinities, a NaN with a payload, a subnormal.
    odd = torch.tensor([-32768, 0x7F80, -128, 0x7FC1, 1], dtype=torch.int16).view(torch.bfloat16)
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[:5] = odd


def to_mixed(tensors: dict[str, torch.Tensor]) -> None:
    """Types that differ inside a fused parameter, and between the layers of a stacked one."""
    for name in tensors:
        if "v_proj" in name or "layers.1." in name or "down_proj" in name:
            tensors[name] = tensors[name].bfloat16()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def add_derived(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)


def shard(source: Path, target: Path, num_shards: int = 3) -> Path:
    """The checkpoint cut into files with an index, layers of one kind torn apart."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    tensors, weight_map = tensors_of(source), dict[str, str]()
    for index in range(num_shards):
        names = sorted(tensors)[index::num_shards]
        save_file({name: tensors[name] for name in names}, target / f"part-{index}.safetensors")
        weight_map |= dict.fromkeys(names, f"part-{index}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def make_sources(folder: Path) -> dict[str, Path]:
    qwen2 = make_qwen2(folder / "qwen2", seed=1)
    found = {
        "qwen2": qwen2,
        "llama": make_llama(folder / "llama", seed=2),
        "untied": make_qwen2(folder / "untied", seed=3, tied=False),
        "bf16": variant(qwen2, folder / "bf16", to_bf16),
        "mixed": variant(qwen2, folder / "mixed", to_mixed),
    }
    found["sharded"] = shard(found["llama"], folder / "sharded")
    for path in found.values():
        (path / "tokenizer.json").write_text("{}")
    return found


def bad_sources(folder: Path, good: Path, sharded: Path) -> dict[str, tuple[Path, list[str]]]:
    """By name: a broken copy, and the words that the message must have."""

    def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.pop(name)

    def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.update({name: value})

    norm, head = "model.layers.2.input_layernorm.weight", "lm_head.weight"
    found = {
        "missing tensor": (variant(good, folder / "a", without(norm)), [norm, "no tensor"]),
        "wrong shape": (variant(good, folder / "b", put(norm, torch.ones(47))), [norm, "[47]", "[48]", "model.safetensors"]),
        "unknown tensor": (variant(good, folder / "c", put("model.extra", torch.ones(3))), ["model.extra", "unknown"]),
        "wrong type": (variant(good, folder / "d", put(norm, torch.ones(48, dtype=torch.int32))), [norm, "int32", "bfloat16"]),
        "tied but other": (variant(good, folder / "e", put(head, torch.ones(131, 48))), [head, "tie_word_embeddings"]),
    }
    cut = shutil.copytree(good, folder / "f")
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-1000])
    found["cut short"] = (cut, [str(cut / "model.safetensors"), "bytes"])
    gone = shutil.copytree(sharded, folder / "g")
    (gone / "part-1.safetensors").unlink()
    found["missing shard"] = (gone, ["part-1.safetensors", "index.json"])
    empty = shutil.copytree(good, folder / "h")
    (empty / "model.safetensors").unlink()
    found["no weights"] = (empty, ["holds neither"])
    return found


def make_families(folder: Path) -> dict[str, Path]:
    """One checkpoint of each case of each family."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.dist.programs.convert_sources", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: path for path in sorted(folder.iterdir())}


class Bench:
    """The folders of one test session and what every command said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = make_sources(folder)
        self.families = make_families(folder / "families")
        self.derived = variant(self.sources["qwen2"], folder / "derived", add_derived)
        self.bad = bad_sources(folder / "bad", self.sources["qwen2"], self.sources["sharded"])
        self.before = {name: digest(path) for name, path in self.sources.items()}
        out = folder / "commands.json"
        run_ranks("tests.dist.programs.convert_commands", 1, {"commands": self.commands()}, out)
        self.outcomes: dict[str, dict[str, Any]] = json.loads(out.read_text())

    def there(self, name: str) -> Path:
        return self.folder / "there" / name

    def back(self, name: str) -> Path:
        return self.folder / "back" / name

    def forward(self, source: Path, name: str, *more: str) -> list[str]:
        return ["hf-to-megatron", "--hf", str(source), "--out", str(self.there(name)), *more]

    def backward(self, name: str, *more: str) -> list[str]:
        return ["megatron-to-hf", "--megatron", str(self.there(name)), "--out", str(self.back(name)), *more]

    def commands(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, path in self.sources.items():
            gather = {"gather": name in GATHERED}
            found[f"there {name}"] = {"argv": self.forward(path, name, *LAYOUT, "--verify"), **gather}
            found[f"back {name}"] = {"argv": self.backward(name, "--verify-against", str(path)), **gather}
        for name, path in self.families.items():
            layout = MIXTURE_LAYOUT if name in MIXTURES else LAYOUT
            found[f"there {name}"] = {"argv": self.forward(path, name, *layout, "--verify", "--tokenizer", "none")}
            found[f"back {name}"] = {"argv": self.backward(name, "--verify-against", str(path), "--tokenizer", "none")}
        qwen2 = self.sources["qwen2"]
        found["there derived"] = {"argv": self.forward(self.derived, "derived", "--verify")}
        found["back derived"] = {"argv": self.backward("derived", "--verify-against", str(self.derived))}
        found["there cast"] = {"argv": self.forward(qwen2, "cast", "--dtype", "bf16", "--verify")}
        found["back cast"] = {"argv": self.backward("cast")}
        found["wrong weight"] = {
            "argv": self.forward(qwen2, "wrong", *LAYOUT, "--verify"), "fault": "wrong weight", "value": "linear_proj"
        }  # fmt: skip
        against = ["--out", str(self.back("against")), "--verify-against", str(self.sources["bf16"])]
        found["other reference"] = {"argv": ["megatron-to-hf", "--megatron", str(self.there("qwen2")), *against]}
        full = self.forward(qwen2, "full", *LAYOUT, "--workers", "1")
        found["disk full"] = {"argv": full, "fault": "disk full", "value": 20}
        found["resume otherwise"] = {"argv": [*full, "--dtype", "bf16", "--resume"]}
        found["resume"] = {"argv": [*full, "--resume", "--verify"]}
        full_back = self.backward("qwen2", "--out", str(self.back("full")))
        found["disk full on the way back"] = {"argv": full_back, "fault": "disk full on the way back"}
        found["not empty"] = {"argv": self.forward(qwen2, "qwen2")}
        found["tp 3"] = {"argv": self.forward(qwen2, "tp3", "--tp", "3")}
        found["no checkpoint"] = {"argv": ["megatron-to-hf", "--megatron", str(qwen2), "--out", str(self.back("none"))]}
        for name, (path, _) in self.bad.items():
            found[name] = {"argv": self.forward(path, name)}
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("convert"))


GATHERED = ["llama", "bf16"]
"""Converted through memory; the others in the kernel where whole rows travel unchanged."""
SOURCES = ["qwen2", "llama", "untied", "bf16", "mixed", "sharded"]


@pytest.mark.parametrize("name", SOURCES)
def test_there_and_back_is_bit_exact(bench: Bench, name: str) -> None:
    for way in ("there", "back"):
        assert bench.outcomes[f"{way} {name}"]["code"] == 0, bench.outcomes[f"{way} {name}"]["err"][-2000:]
        assert (bench.outcomes[f"{way} {name}"]["copied"] == 0) == (name in GATHERED)
    assert_same_bits(tensors_of(bench.back(name)), tensors_of(bench.sources[name]))
    unchanged = ["tokenizer.json"] if name in ("bf16", "mixed") else ["config.json", "tokenizer.json"]
    for file in unchanged:
        assert (bench.back(name) / file).read_bytes() == (bench.sources[name] / file).read_bytes()
    source, back = (json.loads((folder / "config.json").read_text()) for folder in (bench.sources[name], bench.back(name)))
    assert back == source | {"dtype": most_common_type(bench.back(name))}
    assert digest(bench.sources[name]) == bench.before[name], "the source was touched"


def test_every_family_there_and_back(bench: Bench) -> None:
    assert set(MIXTURES) < bench.families.keys() and len(bench.families) >= len(MIXTURES) + 15
    for name, source in bench.families.items():
        for way in ("there", "back"):
            assert bench.outcomes[f"{way} {name}"]["code"] == 0, (name, bench.outcomes[f"{way} {name}"]["err"][-2000:])
            assert bench.outcomes[f"{way} {name}"]["copied"] > 0, name
        assert_same_bits(tensors_of(bench.back(name)), tensors_of(source))


def test_verification_prints_a_manifest(bench: Bench) -> None:
    lines = bench.outcomes["there mixed"]["out"].splitlines()
    tensors = tensors_of(bench.sources["mixed"])
    rows = {line.split()[-1]: line.split() for line in lines if len(line.split()) == 4}
    assert rows.keys() == tensors.keys()
    name = "model.embed_tokens.weight"
    expected = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
    assert rows[name] == [expected, "float32", "131x48", name]


def test_cast(bench: Bench) -> None:
    assert bench.outcomes["there cast"]["code"] == 0, bench.outcomes["there cast"]["err"]
    rows = [line.split() for line in bench.outcomes["there cast"]["out"].splitlines()]
    assert {row[1] for row in rows if len(row) == 4} == {"bfloat16"}
    assert bench.outcomes["back cast"]["code"] == 0, bench.outcomes["back cast"]["err"]
    assert {value.dtype for value in tensors_of(bench.back("cast")).values()} == {torch.bfloat16}
    for folder in (bench.there("cast"), bench.back("cast")):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_derived_tensors_are_left_out(bench: Bench) -> None:
    for way in ("there", "back"):
        assert bench.outcomes[f"{way} derived"]["code"] == 0, bench.outcomes[f"{way} derived"]["err"][-2000:]
    assert_same_bits(tensors_of(bench.back("derived")), tensors_of(bench.sources["qwen2"]))


def test_a_wrong_weight_is_found_and_named(bench: Bench) -> None:
    outcome = bench.outcomes["wrong weight"]
    assert outcome["code"] == 1 and not outcome["exists"]
    mismatches = [line for line in outcome["err"].splitlines() if "MISMATCH" in line]
    assert len(mismatches) == 1 and "model.layers.1.self_attn.o_proj.weight" in mismatches[0], outcome["err"]


def test_another_reference_is_told_apart(bench: Bench) -> None:
    outcome = bench.outcomes["other reference"]
    assert outcome["code"] == 1 and not outcome["exists"]
    assert "model.layers.3.mlp.down_proj.weight" in outcome["err"] and "bfloat16" in outcome["err"]


def test_a_full_disk_leaves_nothing_whole_and_resume_finishes(bench: Bench) -> None:
    full, otherwise, resumed = (bench.outcomes[name] for name in ("disk full", "resume otherwise", "resume"))
    assert full["code"] == 1 and not full["exists"] and "No space left" in full["err"] and "--resume" in full["err"]
    assert otherwise["code"] == 1 and "--resume" in otherwise["err"] and not otherwise["exists"]
    assert resumed["code"] == 0, resumed["err"]
    files = sorted((time, name) for name, time in resumed["files"].items() if name.endswith("_0.distcp"))
    config = (bench.sources["qwen2"] / "config.json").stat().st_mtime_ns
    assert len(files) == 6 and files[0][0] > config
    whole = bench.there("qwen2")
    for _, name in files:
        assert (bench.there("full") / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (bench.there("full") / ".journal").exists()
    assert not bench.there("full").with_name("full.partial").exists()
    back = bench.outcomes["disk full on the way back"]
    assert back["code"] == 1 and not bench.back("full").exists() and "No space left" in back["err"]


def test_bad_input_is_named(bench: Bench) -> None:
    for name, (_, words) in bench.bad.items():
        outcome = bench.outcomes[name]
        assert outcome["code"] == 2 and not outcome["exists"], (name, outcome["err"][-500:])
        assert not bench.there(name).with_name(f"{name}.partial").exists(), name
        for word in words:
            assert word in outcome["err"], (name, word, outcome["err"][-500:])


@pytest.mark.parametrize(
    ("name", "words"),
    [("not empty", ["not empty", "--out"]), ("tp 3", ["--tp: 3", "4 attention heads"]), ("no checkpoint", [".metadata"])],
)
def test_bad_usage_is_named(bench: Bench, name: str, words: list[str]) -> None:
    outcome = bench.outcomes[name]
    assert outcome["code"] == 2
    for word in words:
        assert word in outcome["err"], outcome["err"]


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2 sp": {"tp": 2, "sequence_parallel": True}, "pp2 vpp2": {"pp": 2, "vpp": 2}},
    4: {"tp2 pp2": {"tp": 2, "pp": 2}},
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_any_layout_loads_it(bench: Bench, world_size: int) -> None:
    """Written for tp 2, pp 3; bit-equal to what the Hugging Face folder gives each rank, by rlx and by stock Megatron."""
    cases = {name: {"hf": str(bench.sources[name]), "megatron": str(bench.there(name))} for name in ("qwen2", "untied", "bf16")}
    arguments: dict[str, Any] = {"cases": cases, "layouts": LAYOUTS[world_size]}
    if world_size == 2:
        cases["qwen2"]["stock_save"] = str(bench.folder / "stock")
        arguments["broken"] = {"cut short": str(cut_short(bench)), "other config": str(other_config(bench))}
    out = bench.folder / f"loads{world_size}.pt"
    run_ranks("tests.dist.programs.convert_loads", world_size, arguments, out)
    results = torch.load(out, weights_only=True)
    for layout in LAYOUTS[world_size]:
        for case in cases:
            expected = {"ours": True, "stock": True, "critic": True, "missing": [], "unexpected": []}
            assert results[f"{case} {layout}"] == expected, (case, layout, results[f"{case} {layout}"])
        if world_size == 2:
            assert "not whole" in results[f"cut short {layout}"]
            assert "config.json implies" in results[f"other config {layout}"]
    if world_size == 2:
        check_stock_checkpoint(bench)


MIXTURE_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "tp2 ep2 etp1": {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    "pp2": {"pp": 2},
}


def test_any_layout_loads_mixtures(bench: Bench) -> None:
    """Dense layers between those with experts, shared experts, latent attention, a bias of the router's scores."""
    assert_loaded(bench, ("qwen3_moe", "qwen2_moe", "deepseek_v3"), MIXTURE_LAYOUTS)


def test_any_layout_loads_a_tower(bench: Bench) -> None:
    layouts = {"tp2 sp": {"tp": 2, "sequence_parallel": True}, "pp2 vpp2": {"pp": 2, "vpp": 2}}
    assert_loaded(bench, ("qwen2.5-vl-tied", "qwen2-vl"), layouts)


def assert_loaded(bench: Bench, names: tuple[str, ...], layouts: dict[str, dict[str, Any]]) -> None:
    cases = {name: {"hf": str(bench.families[name]), "megatron": str(bench.there(name))} for name in names}
    out = bench.folder / f"loads of {names[0]}.pt"
    run_ranks("tests.dist.programs.convert_loads", 2, {"cases": cases, "layouts": layouts}, out)
    results = torch.load(out, weights_only=True)
    for layout in layouts:
        for case in cases:
            expected = {"ours": True, "stock": True, "critic": True, "missing": [], "unexpected": []}
            assert results[f"{case} {layout}"] == expected, (case, layout, results[f"{case} {layout}"])


def cut_short(bench: Bench) -> Path:
    folder = shutil.copytree(bench.there("qwen2"), bench.folder / "cut")
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def other_config(bench: Bench) -> Path:
    folder = shutil.copytree(bench.there("qwen2"), bench.folder / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return folder


def check_stock_checkpoint(bench: Bench) -> None:
    """What stock Megatron saved under tp 2, vocabulary padded, comes back as the source."""
    source, back = bench.sources["qwen2"], bench.folder / "from stock"
    argv = ["megatron-to-hf", "--megatron", str(bench.folder / "stock"), "--out", str(back), "--config", str(source)]
    out = bench.folder / "stock.json"
    commands = {"back": {"argv": [*argv, "--tokenizer", str(source), "--verify-against", str(source)]}}
    run_ranks("tests.dist.programs.convert_commands", 1, {"commands": commands}, out)
    assert json.loads(out.read_text())["back"]["code"] == 0, out.read_text()
    assert_same_bits(tensors_of(back), tensors_of(source))
