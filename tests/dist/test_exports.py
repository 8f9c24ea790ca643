"""What is written describes itself, whoever writes it: the type of its weights, the tokenizer and the template of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.dist.checkpoints import make_qwen2
from tests.dist.launch import ROOT, run_ranks

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
WRITERS = ["export", "checkpoint/policy", "version-7", "reward-model", "converted"]
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def make_tokenizer(folder: Path, words: list[str], chat_template: str) -> Path:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the type of the run; the model's configuration says the other of the two, under one spelling or the other."""
    work = tmp_path_factory.mktemp("exports")
    found = {}
    for dtype, (key, other) in {"fp32": ("torch_dtype", "bfloat16"), "bf16": ("dtype", "float32")}.items():
        model = make_qwen2(work / f"model of {dtype}")
        config = json.loads((model / "config.json").read_text())
        config.pop("dtype", None)
        (model / "config.json").write_text(json.dumps(config | {key: other}))
        make_tokenizer(model, ["old"], chat_template="old")
        (model / "vocab.txt").write_text("of the old tokenizer")
        tokenizer = make_tokenizer(work / f"tokenizer of {dtype}", ["new", "words"], chat_template="none")
        (tokenizer / "config.json").write_text("{}")
        template = work / "template.jinja"
        template.write_text(TEMPLATE)
        found[dtype] = work / dtype
        arguments = {
            "model": str(model),
            "tokenizer": str(tokenizer),
            "chat_template": str(template),
            "folders": {dtype: str(found[dtype])},
        }
        run_ranks("tests.dist.programs.exports", 1, arguments, work / f"{dtype}.out")
        checkpoint, converted = found[dtype] / "checkpoint" / "policy", found[dtype] / "converted"
        command = ["megatron-to-hf", "--megatron", str(checkpoint), "--out", str(converted)]
        done = subprocess.run(
            [sys.executable, "-m", "converters", *command], cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_writer_describes_what_it_wrote(folders: dict[str, Path], dtype: str, writer: str) -> None:
    folder = folders[dtype] / writer
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in ("dtype", "torch_dtype") if key in config} == {
        "torch_dtype" if dtype == "fp32" else "dtype": TYPES[dtype]
    }
    assert str(AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.") == TYPES[dtype]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {f"torch.{TYPES[dtype]}"}  # noqa: SIM118
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.tokenize("new words old") == ["new", "words", "<unk>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "new"}], tokenize=False) == "[new]"
    assert not (folder / "vocab.txt").exists()
