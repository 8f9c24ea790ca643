"""What would end a run after it began is refused before anything starts, with the key or the file and line; `rlx check` finds
it without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlx.arch.families.registry import architecture_of
from rlx.arch.sizes import expected_shapes
from rlx.cli.main import main
from rlx.cluster.preflight import inspect, preflight
from rlx.config.load import ConfigError, load_config
from tests.tiny import SHAPE, write_model, write_tokenizer, write_weights

SMALL = SHAPE | {"num_hidden_layers": 2}
OUTSIDE = "~"  # token 95 of the tokenizer
Refusals = Callable[..., list[str]]


class Run:
    """A run that could start, and what is found wrong with it under overrides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", SMALL)
        self.rows([{"prompt": "1+1=", "label": "2"}, {"prompt": "2+2=", "label": "4"}])
        self.yaml = folder / "run.yaml"
        self.yaml.write_text(
            f"model: {{path: {self.model}}}\ndata: {{train: {folder}/rows.jsonl}}\n"
            f"reward: {{name: exact}}\nrun: {{dir: {folder}/run}}\n"
        )

    def rows(self, rows: Iterable[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def problems(self, *overrides: str, num_rows: int | None = None) -> list[str]:
        words = [word.replace("HERE", str(self.folder)) for word in overrides]
        return inspect(load_config(self.yaml, words), num_rows).problems

    def warnings(self, *overrides: str) -> list[str]:
        words = [word.replace("HERE", str(self.folder)) for word in overrides]
        return inspect(load_config(self.yaml, words)).warnings


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_run_that_could_start_is_let_through(run: Run) -> None:
    assert run.problems() == [] and run.warnings() == []


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("wrong", ["run.dir=/proc/x", "rollout.record=/proc/x/a.jsonl", "sync.dir=/proc/x"])
def test_places_that_cannot_be_written_to_are_refused(
    run: Run, wrong: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [wrong, *(["sync.transport=disk"] if wrong.startswith("sync") else [])]
    assert main([command, str(run.yaml), *words]) == 2
    assert f"{wrong.partition('=')[0]}: cannot write to " in capsys.readouterr().err
    assert not (run.folder / "run").exists()


def test_named_losses_are_tried(run: Run) -> None:
    (run.folder / "mine.py").write_text("def f(inputs, config): return inputs.logprobs_T\ndef g(inputs): ...\n")
    for name, words in (("HERE/mine.py:f", "returned a tensor"), ("HERE/mine.py:g", "cannot be called"), ("x", "one of clipped")):
        (problem,) = run.problems(f"algorithm.loss='{name}'")
        assert problem.startswith("algorithm.loss") and words in problem
    assert run.problems("algorithm.loss=clipped") == []


@pytest.mark.parametrize("key", ["algorithm.loss", "algorithm.advantages", "reward.name"])
def test_a_file_that_ends_its_process_is_refused(run: Run, key: str) -> None:
    (run.folder / "ends.py").write_text("import os\nos._exit(0)\n")
    (problem,) = run.problems("algorithm.name=grpo", "rollout.samples_per_prompt=2", f"{key}='HERE/ends.py:f'")
    assert problem.startswith(f"{key}: {run.folder}/ends.py: importing it ended the process with status 0")


SFT = ("finetune.objective=sft", "reward.name=''")


@pytest.mark.parametrize("tp", [1, 2])
def test_token_ids_beyond_the_embedding(run: Run, tp: int) -> None:
    """With tp 1 they were an IndexError in step 1, with tp 2 they were trained on."""
    write_model(run.model, SMALL | {"vocab_size": 95})
    layout = f"parallel.tp={tp}"
    rows = [{"prompt": "1+1=", "label": "2", "response": "2"}, {"prompt": f"1{OUTSIDE}", "label": "2", "response": "2"}]
    path = run.rows(rows)
    wanted = f"{path}:2: token 95 is outside the vocabulary of 95"
    assert run.problems(layout) == [wanted]
    assert run.problems(layout, *SFT) == [f"data.train: {wanted}"]
    assert run.problems(layout, num_rows=1) == []
    (warning,) = run.warnings(layout, "data.train=HERE/good.jsonl") if run.rows(rows[:1], "good.jsonl") else ()
    assert warning.startswith("model.tokenizer_path: 2 of its tokens, from '~' (95) on, are outside the vocabulary of 95")
    (problem,) = run.problems(layout, *SFT, "data.train=HERE/good.jsonl", "evaluation.data=HERE/rows.jsonl")
    assert problem == f"evaluation.data: {wanted}"


def test_a_larger_tokenizer(run: Run) -> None:
    other = run.folder / "tokenizer"
    other.mkdir()
    write_tokenizer(other, 200)
    assert run.problems("model.tokenizer_path=HERE/tokenizer") == []
    assert "outside the vocabulary of 131" in run.warnings("model.tokenizer_path=HERE/tokenizer")[0]
    write_model(run.model, SMALL | {"vocab_size": 1})
    assert "its end-of-sequence token 1 is outside the vocabulary of 1" in "\n".join(run.problems())


def shapes(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    found = {**expected_shapes(architecture_of(SMALL)), **{name: shape for name, shape in changes.items() if shape is not None}}
    return {name: shape for name, shape in found.items() if changes.get(name, shape) is not None}


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def test_weights_are_judged_by_their_headers(run: Run) -> None:
    file = run.model / "model.safetensors"
    write_weights(file, shapes(**{NORM: None}))
    assert run.problems() == [f"model.path: {run.model} does not hold what its config.json says: no tensor {NORM}"]
    write_weights(file, shapes(**{EMBEDDING: (130, 96)}))
    assert f"{EMBEDDING} has shape [130, 96], config.json implies [131, 96]" in run.problems()[0]
    write_weights(file, shapes(), dtype="I32")
    assert "has dtype int32; supported: float32" in run.problems()[0] and "and 2" in run.problems()[0]
    write_weights(file, shapes())
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    assert "cannot be read: it has" in run.problems()[0]
    file.unlink()
    assert run.problems()[0].startswith(f"model.path: {run.model} holds neither")
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "a.safetensors"}}))
    assert "names a.safetensors, which is not there" in run.problems()[0]


def test_each_role_has_its_weights(run: Run) -> None:
    other = write_model(run.folder / "other", SMALL)
    write_weights(other / "model.safetensors", shapes(**{"lm_head.weight": None, NORM: None}))
    kl = ("algorithm.kl_placement=loss", "algorithm.kl_coefficient=0.1")
    assert "model.reference_path" in run.problems("model.reference_path=HERE/other", *kl)[0]
    assert run.problems("model.critic_path=HERE/other")[0].endswith(f"says: no tensor {NORM}"), "a critic needs no output layer"
    assert (
        "lm_head.weight"
        in run.problems("model.critic_path=HERE/other", "algorithm.name=prime", "rollout.samples_per_prompt=2")[0]
    )
    pairs = run.rows([{"prompt": "1", "chosen": "2", "rejected": "3"}], "pairs.jsonl")
    rm = ("finetune.objective=rm", "reward.name=''", f"data.train={pairs}")
    write_weights(run.model / "model.safetensors", shapes(**{"lm_head.weight": None, "score.weight": (1, 96)}))
    assert run.problems(*rm) == []
    write_weights(run.model / "model.safetensors", shapes(**{"score.weight": (2, 96)}))
    assert "score.weight has shape (2, 96), a reward model's is (1, 96)" in run.problems(*rm)[0]


def test_a_converted_checkpoint_is_whole(run: Run) -> None:
    (run.model / "metadata.json").write_text("{}")
    (run.model / "__0_0.distcp").write_bytes(b"123")
    (run.model / "rlx_manifest.json").write_text(json.dumps({"files": {"__0_0.distcp": 3}}))
    assert run.problems() == []
    (run.model / "__0_0.distcp").write_bytes(b"12")
    assert "has 2 bytes, rlx_manifest.json says 3" in run.problems()[0]
    assert "SGLang cannot read the converted checkpoint" in "\n".join(run.problems("rollout.engine=sglang"))
    assert len(run.problems("rollout.engine=sglang", "rollout.server_args.load_format=dummy")) == 1


FUNCTIONS = """
def plain(prompt_text, response, label): return 1.0
def extra(prompt_text, response, label, **extra): return 1.0
def level(prompt_text, response, label, level): return 1.0
def only(prompt, answer, label, /, **extra): return 1.0
async def later(prompt_text, response, label): return 1.0
def many(prompt_text, response, label): yield 1.0
"""


@pytest.mark.parametrize(
    ("function", "columns", "words"),
    [
        ("plain", {}, None),
        ("plain", {"level": 3}, "got an unexpected keyword argument 'level'"),
        ("extra", {"level": 3}, None),
        ("extra", {"response": "x"}, "multiple values for argument 'response'"),
        ("extra", {"prompt_text": "x"}, "multiple values for argument 'prompt_text'"),
        ("level", {"level": 3}, None),
        ("level", {}, "missing a required argument: 'level'"),
        ("only", {"response": "x"}, None),
        ("absent", {}, "has no function 'absent'"),
        ("later", {}, "later of"),
        ("many", {}, "many of"),
    ],
)
def test_a_reward_function_is_bound_to_the_columns(
    run: Run, function: str, columns: dict[str, object], words: str | None
) -> None:
    (run.folder / "mine.py").write_text(FUNCTIONS)
    path = run.rows([{"prompt": "1", "label": "2", **columns}])
    found = run.problems(f"reward.name=HERE/mine.py:{function}")
    if words is None:
        assert found == []
    else:
        (problem,) = found
        is_of_the_file = function in ("absent", "later", "many")
        assert words in problem and problem.startswith("reward.name: " if is_of_the_file else f"{path}:1: reward.name: ")


@pytest.mark.parametrize(("function", "problem"), [("plain", False), ("extra", False), ("only", False), ("level", True)])
def test_a_column_called_label_beside_the_label(run: Run, function: str, problem: bool) -> None:
    """With data.label_key naming another column, that one is what the function's ``label`` gets."""
    (run.folder / "mine.py").write_text(FUNCTIONS)
    run.rows([{"prompt": "1", "label": "2", "q": "3"}])
    assert bool(run.problems(f"reward.name=HERE/mine.py:{function}", "data.label_key=q")) == problem


def test_a_later_row_with_other_columns(run: Run) -> None:
    (run.folder / "mine.py").write_text(FUNCTIONS)
    path = run.rows([{"prompt": "1", "label": "2"}, {"prompt": "1", "label": "2", "level": 3}])
    (problem,) = run.problems("reward.name=HERE/mine.py:plain")
    assert problem.startswith(f"{path}:2: ")
    assert run.problems("reward.name=HERE/mine.py:plain", num_rows=1) == [], "only later rows show it"
    sums = "reward.args={parts: [{name: exact}, {name: HERE/mine.py:plain}]}"
    assert run.problems("reward.name=sum", sums)[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.name=exactt"], ["reward.name must be one of exact", "exactt"]),
        (["reward.args.strip=7"], ["reward.args.strip: exact expects bool, got 7"]),
        (["reward.args.nope=7"], ["reward.args do not fit the verifier exact", "nope"]),
        (["reward.name=code", "reward.args.timeout_s=-1"], ["reward.args.timeout_s: must be above 0, got -1"]),
        (["reward.name=code", "reward.args.memory_mb=1.5"], ["reward.args.memory_mb: code expects int"]),
        (["reward.name=http", "reward.args={url: 'http://a', max_retries: -1}"], ["reward.args.max_retries: must be at least 0"]),
        (["reward.name=judge", "reward.args={url: 'http://a', model: m, pattern: '('}"], ["not a regular expression"]),
        (["reward.name=by_source", "reward.args={sources: {a: {name: exact}}}"], ["rows.jsonl:1", "no verifier for"]),
        (["reward.name=code", "data.label_key=prompt"], ["rows.jsonl:1"]),
        (["data.prompt_key=question"], ["rows.jsonl:1", "neither a 'messages' nor a 'question' column"]),
        (["data.label_key=answer"], ["rows.jsonl", "'answer'", "data.label_key"]),
        (["rollout.server_args.max_runing=4"], ["rollout.server_args", "--max-runing"]),
        (["rollout.server_args.threads=0"], ["rollout.server_args", "must be at least 1"]),
        (["rollout.server_args.attention_backend=fa3"], ["rollout.server_args", "embedded engine", "--attention-backend"]),
        (["rollout.server_args.port=4"], ["rollout.server_args.port is set by rlx itself"]),
        (["rollout.engine=sglang", "rollout.server_args.tp-size=4"], ["rollout.server_args.tp_size is set by rlx itself"]),
        (["rollout.engine=sglang", "rollout.server_args.context_length=99"], ["context_length: 99", "1280"]),
        (["reward.name=http", "reward.args={url: 'http://:80/score'}"], ["reward.args.url must be a URL"]),
        (["model.tokenizer_path=HERE"], ["model.tokenizer_path", "holds no tokenizer"]),
    ],
)
def test_settings_that_a_process_would_end_on(run: Run, overrides: list[str], words: list[str]) -> None:
    (problem,) = run.problems(*overrides)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [("numeric", "two", "holds no number"), ("math", "$ $", "holds no expression"), ("math", "\\boxed{}", "holds no expression")],
)
def test_a_label_that_no_answer_can_match(run: Run, name: str, label: str, words: str) -> None:
    path = run.rows([{"prompt": "1+1=", "label": "2"}, {"prompt": "1+1=", "label": label}, {"prompt": "1+1="}])
    (problem,) = run.problems(f"reward.name={name}")
    assert problem.startswith(f"{path}:2: ") and words in problem
    sums = f"reward.args={{parts: [{{name: exact}}, {{name: {name}}}]}}"
    assert run.problems("reward.name=sum", sums)[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"eos_token_id": 9999}', '{"eos_token_id": "a"}', '{"eos_token_id": [1, null]}', b"\xff"]
)
@pytest.mark.parametrize("options", [(), SFT])
def test_what_ends_an_answer_must_be_readable(run: Run, text: str | bytes, options: tuple[str, ...]) -> None:
    run.rows([{"prompt": "1", "label": "2", "response": "2"}])
    file = run.model / "generation_config.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    (problem,) = run.problems(*options)
    assert problem.startswith(f"model.path: {file}")


def test_what_only_later_rows_show_is_a_warning(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "1+1=", "response": " "}] * 2
    run.rows([*rows, {"prompt": "1+1=", "label": "2", "response": "2"}])
    assert run.problems(num_rows=2) == [] and "the first 2 rows have no 'label'" in caplog.text
    assert run.problems(*SFT, num_rows=2) == [] and "all 2 rows are dropped (empty_answer 2); the file has more" in caplog.text
    assert run.problems("data.max_prompt_tokens=1", num_rows=2) == [] and "the first 2 prompts are all longer" in caplog.text
    run.rows(rows)
    for num_rows in (None, 2, 3):
        assert "have no 'label'" in run.problems(num_rows=num_rows)[0]
        assert "all 2 rows are dropped" in run.problems(*SFT, num_rows=num_rows)[0]
        assert "all 2 prompts are longer" in run.problems("data.max_prompt_tokens=1", num_rows=num_rows)[0]


def test_a_recording_is_read(run: Run) -> None:
    group = {"step": 1, "prompt_id": 0, "prompt_tokens": [5], "rewards": None}
    answer = {"token_ids": [7], "rollout_logprobs": [-1.0], "finish_reason": "stop", "weight_versions": [0]}
    rows = [group | {"completions": [answer]}, group | {"completions": [answer | {"token_ids": [131]}]}]
    path = run.rows(rows, "groups.jsonl")
    replay = "rollout.replay=HERE/groups.jsonl"
    assert run.problems(replay) == [f"rollout.replay: {path}:2: token 131 is outside the vocabulary of 131"]
    assert run.problems(replay, num_rows=1) == []
    run.rows([{"step": 1}], "groups.jsonl")
    assert run.problems(replay)[0].startswith(f"rollout.replay: {path}:1: KeyError('prompt_tokens')")


def test_preflight_counts_examples_and_needs_the_machine(run: Run) -> None:
    run.rows([{"prompt": "1", "response": "2"}] * 10 + [{"prompt": "1", "response": " "}])
    config = load_config(run.yaml, [*SFT, "finetune.epochs=3", "finetune.examples_per_step=4"])
    assert preflight(config).run.steps == 8, "30 examples, 4 a step"
    config = load_config(run.yaml, ["rollout.engine=sglang", "tracker.wandb_project=x"])
    with pytest.raises(ConfigError, match="needs the package sglang"):
        preflight(config)


def test_scoring_refuses_the_same(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = run.rows([{"input_ids": [5, 6]}], "tokens.jsonl")
    command = ["score", "--model", str(run.model), "--tokens", str(tokens), "--out", str(run.folder / "out.jsonl")]
    assert main([*command, "--tp", "5"]) == 2
    assert "--tp: 5 does not divide the model's 12 attention heads" in capsys.readouterr().err
    for out in (run.folder, run.folder / "nowhere" / "out.jsonl"):
        assert main([*command[:-1], str(out)]) == 2
        assert f"--out: {out} cannot be written" in capsys.readouterr().err
    run.rows([{"input_ids": [5, 131]}], "tokens.jsonl")
    assert main(command) == 2
    assert f"{tokens}:1: token 131 is outside the vocabulary of 131" in capsys.readouterr().err
    run.rows([{"input_ids": [5]}], "tokens.jsonl")
    write_weights(run.model / "model.safetensors", shapes(**{NORM: None}))
    assert main(command) == 2 and f"no tensor {NORM}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft", "dpo", "rm"])
def test_every_command_refuses_before_it_starts(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    path = run.rows([{"prompt": "1", "response": "2", "chosen": "2", "rejected": "3", "label": "1"}, {"nothing": 1}])
    reward = [] if command == "train" else ["reward.name=''"]
    assert main([command, str(run.yaml), *reward]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: " in error and "Traceback" not in error
    assert not (run.folder / "run").exists()


def test_check_command_finds_it_all_without_torch(run: Run) -> None:
    """One process: status 2, every problem a line, and torch never imported."""
    (run.folder / "mine.py").write_text(FUNCTIONS)
    write_weights(run.model / "model.safetensors", shapes(**{NORM: None}))
    path = run.rows([{"prompt": "1", "label": "2", "response": "x"}])
    program = "import sys\nfrom rlx.cli.main import main\nsys.exit(main() * (1 - 2 * ('torch' in sys.modules)))"
    command = [sys.executable, "-c", program, "check", str(run.yaml), f"reward.name={run.folder}/mine.py:extra"]
    command += ["rollout.server_args.max_runing=4", "algorithm.gamma=0.5", "algorithm.prime_beta=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("rlx: warning: algorithm.prime_beta: changes nothing: algorithm.name is not prime")
    assert [line.split(": ")[0] for line in lines[1:]] == ["model.path", f"{path}:1", "rollout.server_args"]
