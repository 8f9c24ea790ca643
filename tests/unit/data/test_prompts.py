"""Prompt files, chat templates and exact resume, on a tokenizer written here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlx.config.schema import DataConfig
from rlx.config.sources import SourceConfig
from rlx.data.prompts import PromptSource
from rlx.data.questions import read_questions, rendered_fingerprint
from rlx.data.rows import row_digest
from rlx.data.tokenizer import answer_decoder, load_tokenizer
from rlx.types.rollout import Prompt
from tests.trajectories import request

WORDS = ["a", "b", "c", "d", "<user>", "<assistant>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of(template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)


def write(path: Path, rows: list[dict[str, object]]) -> DataConfig:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return DataConfig(train=str(path))


def numbered(num: int) -> list[dict[str, object]]:
    return [{"prompt": "a " * (index % 3 + 1), "label": index, "level": index * 2} for index in range(num)]


def labels(prompts: list[Prompt]) -> list[str | None]:
    return [prompt.label for prompt in prompts]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_become_prompts(tmp_path: Path, ending: str) -> None:
    source = PromptSource(write(tmp_path / f"p.{ending}", numbered(7)), tokenizer_of(), seed=3)
    prompts = source.next(7)
    assert sorted(labels(prompts), key=str) == [str(index) for index in range(7)]
    assert [prompt.prompt_id for prompt in prompts] == list(range(7))
    for prompt in prompts:
        assert prompt.token_ids == (0,) * (int(prompt.label or 0) % 3 + 1)
        assert prompt.extra == {"level": int(prompt.label or 0) * 2}


@pytest.mark.parametrize("stop", [0, 3, 10, 11, 26])
def test_an_interrupted_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path, stop: int) -> None:
    config = write(tmp_path / "p.jsonl", numbered(10))
    whole = PromptSource(config, tokenizer_of(), seed=5).next(40)
    first = PromptSource(config, tokenizer_of(), seed=5)
    head = first.next(stop)
    second = PromptSource(config, tokenizer_of(), seed=5)
    second.load_state(json.loads(json.dumps(first.state())))
    assert head + second.next(40 - stop) == whole


def test_every_epoch_has_its_own_order_and_every_seed_too(tmp_path: Path) -> None:
    config = write(tmp_path / "p.jsonl", numbered(12))
    source = PromptSource(config, tokenizer_of(), seed=5)
    first, second = labels(source.next(12)), labels(source.next(12))
    other = labels(PromptSource(config, tokenizer_of(), seed=6).next(12))
    assert sorted(first, key=str) == sorted(second, key=str)
    assert first != second and first != other
    unshuffled = PromptSource(DataConfig(train=config.train, shuffle=False), tokenizer_of(), seed=5)
    assert labels(unshuffled.next(12)) == [str(index) for index in range(12)]


def test_state_of_another_file_is_refused(tmp_path: Path) -> None:
    state = PromptSource(write(tmp_path / "p.jsonl", numbered(5)), tokenizer_of(), seed=0).state()
    source = PromptSource(write(tmp_path / "p.jsonl", numbered(4)), tokenizer_of(), seed=0)
    with pytest.raises(ValueError, match=r"p\.jsonl is not what it was.*'usable prompts': 5.* then, .*'usable prompts': 4"):
        source.load_state(state)
    rows = [*numbered(4), {"prompt": "a a", "label": "another"}]
    with pytest.raises(ValueError, match=r"data\.train: .*'rows'"):
        PromptSource(write(tmp_path / "p.jsonl", rows), tokenizer_of(), seed=0).load_state(state)


def chats(num: int) -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": "a " * (index + 1)}], "label": index} for index in range(num)]


def test_a_chat_keeps_its_messages_and_what_the_template_opened(tmp_path: Path) -> None:
    thinking = TEMPLATE + "{% if add_generation_prompt %} <think>\n{% endif %}"
    for template, opening in ((TEMPLATE, ""), (thinking, "<think>\n")):
        config = replace(write(tmp_path / "p.jsonl", chats(1)), system_prompt="b")
        (prompt,) = PromptSource(config, tokenizer_of(template), seed=0).next(1)
        assert prompt.messages == ({"role": "system", "content": "b"}, {"role": "user", "content": "a "})
        asked = request(prompt, "c")
        assert asked.opening == opening
        assert asked.messages == [*prompt.messages, {"role": "assistant", "content": f"{opening}c"}]
    (prompt,) = PromptSource(write(tmp_path / "p.jsonl", numbered(1)), tokenizer_of(), seed=0).next(1)
    assert prompt.messages == ()


def test_rows_are_compared_and_not_their_rendering(tmp_path: Path) -> None:
    """A template that writes the date says something else tomorrow; another template is another run."""
    config, dated = write(tmp_path / "p.jsonl", chats(5)), "{{ strftime_now('%d') }} " + TEMPLATE
    first = PromptSource(config, dated_tokenizer(tmp_path, dated, "2025-01-31"), seed=0)
    first.next(3)
    later = PromptSource(config, dated_tokenizer(tmp_path, dated, "2025-02-01"), seed=0)
    later.load_state(json.loads(json.dumps(first.state())))
    rest = [(prompt.label, prompt.text[3:]) for prompt in later.next(4)]
    assert rest == [(prompt.label, prompt.text[3:]) for prompt in first.next(4)]
    with pytest.raises(ValueError, match=r"data\.chat_template: .*another.*begin a new run"):
        PromptSource(config, tokenizer_of(TEMPLATE), seed=0).load_state(first.state())


def test_a_template_takes_the_runs_day_for_today(tmp_path: Path) -> None:
    config = write(tmp_path / "p.jsonl", chats(1))
    template = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    (prompt,) = PromptSource(config, dated_tokenizer(tmp_path, template, "2025-01-31"), seed=0).next(1)
    assert prompt.text == "31 Jan 2025a "


def dated_tokenizer(folder: Path, template: str, day: str) -> PreTrainedTokenizerBase:
    tokenizer_of(template).save_pretrained(folder / "tokenizer")
    return load_tokenizer(str(folder / "tokenizer"), template_date=day)


def test_the_state_of_an_older_checkpoint_is_known_by_what_was_rendered(tmp_path: Path) -> None:
    def older(source: PromptSource) -> dict[str, Any]:
        state = source.state()
        del state["template"], state["sources"][""]["rows"]
        questions, _ = read_questions(SourceConfig(path=str(config.train)), config, tokenizer_of())
        state["sources"][""]["fingerprint"] = rendered_fingerprint(questions)
        return state

    config = write(tmp_path / "p.jsonl", numbered(7))
    first = PromptSource(config, tokenizer_of(), seed=0)
    first.next(4)
    second = PromptSource(config, tokenizer_of(), seed=0)
    second.load_state(older(first))
    assert second.next(9) == first.next(9)
    state = older(first)
    changed = write(tmp_path / "p.jsonl", [*numbered(6), {"prompt": "d"}])
    with pytest.raises(ValueError, match=r"'fingerprint'.*data\.template_date"):
        PromptSource(changed, tokenizer_of(), seed=0).load_state(state)


def test_how_a_file_spells_a_row_does_not_matter() -> None:
    row: dict[str, object] = {"prompt": "a", "label": 1, "meta": {"x": [1, {"y": 2.5}], "none": None}}
    same: dict[str, object] = {"none": None, "meta": {"x": [1, {"y": 2.5, "z": None}]}, "label": 1, "prompt": "a"}
    assert row_digest(row) == row_digest(same)
    others: list[dict[str, object]] = [{**row, "label": 2}, {**row, "label": "1"}, {**row, "meta": {"x": [1]}}, {"prompt": "a"}]
    assert len({row_digest(other) for other in [row, *others]}) == 5
    assert row_digest({"a": {"x", "y"}, "b": object()}) == row_digest({"a": {"y", "x"}, "b": object()})


def test_too_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    config = write(tmp_path / "p.jsonl", numbered(9))
    short = DataConfig(train=config.train, max_prompt_tokens=2)
    source = PromptSource(short, tokenizer_of(), seed=0)
    assert source.drops == {"prompt_too_long": 3} and len(source) == 6
    assert source.metrics() == {"data/epoch": 0.0, "data/prompt_too_long": 3.0}
    write(tmp_path / "p.jsonl", [{"prompt": "a b c"}])
    with pytest.raises(ValueError, match=r"all 1 prompts are longer than data\.max_prompt_tokens = 2"):
        PromptSource(short, tokenizer_of(), seed=0)


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"messages": [{"role": "user", "content": "b c"}], "prompt": "ignored"}]
    config = write(tmp_path / "p.jsonl", rows)
    (prompt,) = PromptSource(config, tokenizer_of(TEMPLATE), seed=0).next(1)
    assert prompt.text == "<user> b c <assistant>" and prompt.token_ids == (4, 1, 2, 5)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*data\.chat_template"):
        PromptSource(config, tokenizer_of(), seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n\n["a"]\n', r"p\.jsonl:3: expected a JSON object"),
        ('{"question": "a", "answer": 1}\n', r"p\.jsonl:1: .*the columns are question, answer"),
        ('{"prompt": 5}\n', r"p\.jsonl:1: column 'prompt' must be text, got int"),
        ('{"prompt": ""}\n', r"p\.jsonl:1: the prompt has no tokens"),
        ('{"messages": "hello"}\n', r"p\.jsonl:1: column 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1: .*message 0 needs a role and content"),
        ("\n", "holds no rows"),
    ],
)
def test_faults_of_a_file_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PromptSource(DataConfig(train=str(path)), tokenizer_of(TEMPLATE), seed=0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na\n")
    (tmp_path / "p.parquet").write_text("no parquet")
    for name, message in [("p.csv", "must end in"), ("p.parquet", "cannot be read as parquet"), ("gone.jsonl", "no such file")]:
        with pytest.raises(ValueError, match=message):
            PromptSource(DataConfig(train=str(tmp_path / name)), tokenizer_of(), seed=0)


def test_loading_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(str(folder))
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds no tokenizer; expected one of tokenizer\.json"):
        load_tokenizer(str(folder))
    tokenizer_of().save_pretrained(folder)
    assert load_tokenizer(str(folder)).encode("b d") == [1, 3]
    with pytest.raises(ValueError, match=r"data\.chat_template: no such file"):
        load_tokenizer(str(folder), str(tmp_path / "gone.jinja"))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert load_tokenizer(str(folder), str(tmp_path / "t.jinja")).chat_template == TEMPLATE
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(("skip", "seen"), [(False, "<think>a</think><answer>b</answer>"), (True, "ab")])
def test_verifiers_see_special_tokens_but_not_those_that_end_an_answer(tmp_path: Path, skip: bool, seen: str) -> None:
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens(
        {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": [*tags, "<turn>", "<stop>"]}
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.convert_tokens_to_ids("<turn>")]}))
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    decode = answer_decoder(tokenizer, str(tmp_path), [stop], skip_special_tokens=skip)
    for end in ("", "<eos>", "<turn>", "<stop>", "<eos><pad><pad>"):
        ids = tokenizer.encode(f"<think> a </think> <answer> b </answer> {end}", add_special_tokens=False)
        assert decode(ids).replace(" ", "") == seen, end
