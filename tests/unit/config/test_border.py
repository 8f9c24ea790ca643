"""What YAML, OmegaConf, the file system and the locale find wrong is said by file or key, with status 2, never as a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.cli.main import main
from rlx.config.load import ConfigError, load_config

PATHS = (
    "model.path", "model.reference_path", "model.critic_path", "model.tokenizer_path", "data.train", "data.chat_template",
    "data.sources.a.path", "evaluation.data", "evaluation.sets.a.path", "rollout.replay", "rollout.record", "rollout.python",
    "reward.name", "run.dir", "sync.dir",
)  # fmt: skip
ENDINGS = {"data.train": ".jsonl", "evaluation.data": ".jsonl", "reward.name": ".py:f"}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("odd", ["a loop of links", "a file as folder", "too long", "a null byte"])
def test_paths_that_cannot_be_are_refused_by_key(run_yaml: Path, key: str, odd: str) -> None:
    ending = ENDINGS.get(key, ".jsonl" if key.endswith("a.path") else "")
    folder = run_yaml.parent
    for one, other in (("a", "b"), ("b", "a")):
        (folder / f"{one}{ending.partition(':')[0]}").symlink_to(folder / f"{other}{ending.partition(':')[0]}")
    name = {"a loop of links": "a", "a file as folder": "run.yaml/x", "too long": "x" * 300, "a null byte": "a\\0b"}[odd]
    override = f'{key}="{folder}/{name}{ending}"'
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml, [override])
    assert any(problem.startswith(f"{key}: ") for problem in caught.value.problems)


ODD_FILES = [
    ("a: &a\n  b: *a\n", "recursive aliases"),
    ("a: " + "[" * 5000 + "]" * 5000, "nests too deep"),
    ("reward: {args: " + "{a: " * 3000 + "1" + "}" * 3001, "nests too deep"),
    ("run: {seed: " + "9" * 5000 + "}", "4300 digits"),
    ('run: {dir: "${run.dir}"}', "run.dir: Recursive interpolation"),
    ('run: {dir: "${a.b}"}', "run.dir: Interpolation key 'a.b' not found"),
    ('run: {dir: "${oc.env:RLX_NO_SUCH}"}', "run.dir: "),
    ('run: {dir: "${a"}', "run.dir: "),
    ("a: !!python/object:os.system x", "not valid YAML"),
    ("a: \x00", "not valid YAML"),
    ('run: {dir: "\\ud83d"}', "not valid YAML"),
]


@pytest.mark.parametrize(("text", "words"), ODD_FILES, ids=lambda text: text[:30])
def test_odd_files_are_named(run_yaml: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    odd = run_yaml.parent / "odd.yaml"
    odd.write_text(text)
    run_yaml.write_text(f"defaults: [odd.yaml]\n{run_yaml.read_text()}")
    for file in (odd, run_yaml):
        assert main(["check", str(file)]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said and ("odd.yaml" in said or "run.dir: " in said)


@pytest.mark.parametrize("loops", ["run.yaml", "base.yaml"])
def test_a_loop_of_links_as_file_is_named(run_yaml: Path, capsys: pytest.CaptureFixture[str], loops: str) -> None:
    run_yaml.write_text("defaults: [base.yaml]\n")
    (run_yaml.parent / loops).unlink(missing_ok=True)
    (run_yaml.parent / loops).symlink_to(run_yaml.parent / loops)
    assert main(["check", str(run_yaml)]) == 2
    assert f"{loops}" in (said := capsys.readouterr().err) and "symbolic links" in said


@pytest.mark.parametrize(
    "override",
    [
        "reward.args=" + "{a: " * 2000 + "1" + "}" * 2000,
        "reward.args=" + "{a: " * 60 + "1" + "}" * 60,
        "run.seed=" + "9" * 5000,
        "run.seed=" + "[" * 3000,
        "run.dir=${a",
        "run.dir=\x00",
        "data.system_prompt=\udcff",
        'data.system_prompt="\\ud83d"',
    ],
    ids=lambda text: text[:20],
)
def test_odd_overrides_are_named(run_yaml: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert main(["check", str(run_yaml), override]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and override.partition("=")[0] in said and len(said) < 1500


@pytest.mark.parametrize("program", ["rlx.cli.main", "converters"])
def test_arguments_and_output_are_utf_8_in_any_locale(run_yaml: Path, program: str) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    arguments = {
        "rlx.cli.main": ["check", str(run_yaml), "data.system_prompt=déjà", "run.dir=läufe"],
        "converters": ["hf-to-megatron", "--hf", "déjà", "--out", "läufe"],
    }[program]
    done = subprocess.run([sys.executable, "-m", program, *arguments], env=env, capture_output=True, cwd=Path.cwd(), check=False)
    shown = (done.stdout + done.stderr).decode("utf-8")
    assert "déjà" in shown and done.returncode == (0 if program == "rlx.cli.main" else 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{% for m in messages %}{{ m.content ", ":2: unexpected end of template"),
        ("{{ messages | nonsense }}", ":1: No filter named 'nonsense'"),
        ("{% nonsense %}", ":1: Encountered unknown tag 'nonsense'"),
    ],
)
def test_a_file_that_is_no_template_is_no_rows_fault(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    template = run_yaml.parent / "chat.jinja"
    template.write_text(text)
    assert main(["check", str(run_yaml), f"data.chat_template={template}"]) == 2
    assert f"data.chat_template: {template}{words}" in capsys.readouterr().err
