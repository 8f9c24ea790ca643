"""``rlx reward try``: verdicts on the first rows, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.cli.main import main

SHAPE = {
    "model_type": "qwen2", "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 8,
    "intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """A configuration with ten rows; their labels are 0 to 9."""
    model = tmp_path / "model"
    words = ["<unk>", *map(str, range(10)), "next", "<eos>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>").save_pretrained(model)
    (model / "config.json").write_text(json.dumps(SHAPE))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"next {n}", "label": str(n)}) + "\n" for n in range(10)))
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{train: {tmp_path}/train.jsonl}}\nreward: {{name: exact}}\nalgorithm: {{name: ppo}}\n"
    )
    return ["reward", "try", str(tmp_path / "run.yaml")]


def verdicts(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def answers(folder: Path, *responses: object) -> list[str]:
    (folder / "answers.jsonl").write_text("".join(json.dumps({"response": response}) + "\n" for response in responses))
    return ["--answers", str(folder / "answers.jsonl")]


def test_labels_are_right_answers(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run) == 0
    assert verdicts(capsys) == [{"reward": 1.0, "parts": {}, "valid": True, "error": None}] * 8
    assert main([*run, "--rows", "20"]) == 0
    assert len(verdicts(capsys)) == 10


def test_overrides_may_stand_behind_options(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "reward.name=exact", "--rows", "2", "reward.args={}"]) == 0
    assert len(verdicts(capsys)) == 2


def test_a_file_that_ends_its_process_is_refused(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("import os\nos._exit(0)\n")
    parts = f"{{parts: [{{name: exact}}, {{name: {tmp_path}/mine.py:f}}]}}"
    assert main([*run, "reward.name=sum", f"reward.args={parts}"]) == 2
    assert "mine.py: importing it ended the process with status 0" in capsys.readouterr().err


def test_a_function_that_the_rows_do_not_suit_is_refused(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def nothing():\n    return 1.0\n")
    assert main([*run, f"reward.name={tmp_path}/mine.py:nothing"]) == 2
    assert "mine.py:nothing() cannot be called with this row" in capsys.readouterr().err


def test_a_file_without_answers_is_no_success(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, *answers(tmp_path)]) == 2
    assert "answers.jsonl holds no rows" in capsys.readouterr().err


def test_answers_are_judged_by_a_file_with_neighbours(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.py").write_text("RIGHT = 2.0")
    (tmp_path / "mine.py").write_text(
        "def judge(prompt, response, label, bonus):\n"
        "    from weights import RIGHT\n"
        "    value = RIGHT if response.strip() == label else -int(response)\n"
        "    return value + bonus, {'prompt': len(prompt) / 2}\n"
    )
    config = [*run, f"reward.name={tmp_path}/mine.py:judge", "reward.args.bonus=0.5", "reward.max_abs=5"]
    assert main([*config, *answers(tmp_path, "0", "4 <eos>", "next", "9")]) == 1
    found = verdicts(capsys)
    assert [row["reward"] for row in found] == [2.5, -3.5, None, None]
    assert [row["valid"] for row in found] == [True, True, False, False]
    assert found[0]["parts"] == {"prompt": 3.0} and "ValueError: invalid literal" in found[2]["error"]
    assert "beyond reward.max_abs = 5" in found[3]["error"]
    assert main([*config, *answers(tmp_path, "next")]) == 1
    assert [row["valid"] for row in verdicts(capsys)] == [False]


def test_each_source_is_tried_by_its_verifier(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{{path: {tmp_path}/train.jsonl}}"
    args = "{sources: {a: {name: exact}, b: {name: length, args: {free: 0, limit: 2}}}, otherwise: {name: numeric}}"
    config = [*run, "data.train=null", f"data.sources={{a: {path}, b: {path}}}", "reward.name=by_source", f"reward.args={args}"]
    config += [f"evaluation.sets={{held: {path}}}"]
    assert main([*config, "--rows", "2"]) == 0
    assert [row["reward"] for row in verdicts(capsys)] == [1.0, 1.0, -0.5, -0.5]
    assert main([*config, *answers(tmp_path, "7", "1"), "--source", "b"]) == 0
    assert [row["reward"] for row in verdicts(capsys)] == [-0.5, -0.5]
    assert main([*config, *answers(tmp_path, "0", "3"), "--source", "held"]) == 0
    assert [row["reward"] for row in verdicts(capsys)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reward.name=exakt"], "reward.name"),
        (["reward.args={a: 1}"], "reward.args do not fit"),
        (["--source", "b"], "no source is called 'b'"),
        (["--answers", "nowhere.jsonl"], "nowhere.jsonl"),
        (["data.chat_template=nowhere"], "data.chat_template"),
        (["finetune.objective=sft"], "finetune.objective"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    run: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run, *more]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out


def test_answers_that_fit_no_rows_are_refused(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, *answers(tmp_path, "1", 7)]) == 2
    assert "answers.jsonl:2: expected" in capsys.readouterr().err
    assert main([*run, *answers(tmp_path, *"12345678901")]) == 2
    assert "11 answers, but there are 10 prompts" in capsys.readouterr().err
    assert main([*run, *answers(tmp_path, *"12345678901"), "--rows", "3"]) == 0
