"""Values keep their meaning on their way from a file into prompts and examples, and every fault names its place."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlx.config.schema import Config, DataConfig, FinetuneConfig, ModelConfig, RewardConfig
from rlx.data.examples import ExampleSource, check_examples
from rlx.data.prompts import PromptSource
from rlx.data.rows import label_in, read_rows
from rlx.data.tokenizer import encode_text, is_surely_longer
from rlx.rewards.registry import label_use, make_verifier
from rlx.types.rollout import LabelUse, Prompt
from tests.parts import files_of, reader_of
from tests.trajectories import request
from tests.unit.data.bytewise import bytewise

# As the field's templates do: tools in front, tool calls in the assistant's turn, a content that may be missing.
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = TEMPLATE.replace("[{{ m.role }}]", "[{{ m.role }}]{% generation %}").replace(
    "<end>{% endfor %}{% if", "<end>{% endgeneration %}{% endfor %}{% if"
)
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_of(path: str, tokenizer: PreTrainedTokenizerFast, **data: Any) -> list[Prompt]:
    source = PromptSource(DataConfig(train=path, shuffle=False, **data), tokenizer, seed=0)
    return source.next(len(source))


def config_of(path: str, data: Mapping[str, Any] | None = None, **finetune: Any) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(train=path, **(data or {})),
        finetune=FinetuneConfig(**{"objective": "sft", "max_tokens": 4096, **finetune}),
    )


def learnt(path: str, tokenizer: PreTrainedTokenizerFast, **finetune: Any) -> list[str]:
    """Each example's text, what is learnt of it between bars."""
    source = ExampleSource(path, reader_of(config_of(path, **finetune), tokenizer), 0)
    shown = []
    for example in source.first(99):
        for side in example:
            text, inside = "", 0
            for token, mask in zip(side.token_ids, side.loss_mask, strict=True):
                text += "|" * (mask != inside) + tokenizer.decode([token])
                inside = mask
            shown.append(text + "|" * inside)
    return shown


LABELS = [
    ("x", "x"),
    ("", ""),
    ("2.0", "2.0"),
    ("nan", "nan"),
    (72, "72"),
    (-3, "-3"),
    (2.0, "2"),
    (-0.0, "0"),
    (1e20, "100000000000000000000"),
    (2.5, "2.5"),
    (float("nan"), None),
    (None, None),
    (True, True),
    (["2", "two"], ["2", "two"]),
    ({"ground_truth": 2.0}, {"ground_truth": 2.0}),
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(("value", "label"), LABELS, ids=repr)
def test_a_label_is_what_the_file_says(tmp_path: Path, ending: str, value: object, label: object) -> None:
    path = write(tmp_path / f"p.{ending}", [{"prompt": "a", "label": value}])
    (prompt,) = prompts_of(path, bytewise())
    assert prompt.label == label and type(prompt.label) is type(label)


@pytest.mark.parametrize(
    ("spelt", "label"), [("1" + "0" * 400, "1" + "0" * 400), ("-1e999", "-inf"), ("1e-999", "0"), ("NaN", None)], ids=str
)
def test_numbers_that_no_float_holds_are_labels(tmp_path: Path, spelt: str, label: str | None) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "label": ' + spelt + "}")
    (prompt,) = prompts_of(str(path), bytewise())
    assert prompt.label == label


def test_decimals_are_numbers_too(tmp_path: Path) -> None:
    rows = [{"label": Decimal(text)} for text in ("2.00", "2.50")]
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([("label", pyarrow.decimal128(10, 2))]))
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert [label_in(row, "label") for _, row in read_rows(str(tmp_path / "p.parquet"))] == ["2", "2.50"]


@pytest.mark.parametrize(("value", "label"), LABELS, ids=repr)
@pytest.mark.parametrize("index", [0, 70])  # beyond the rows that are tokenised too
def test_what_a_verifier_cannot_compare_is_refused_with_its_line(
    tmp_path: Path, value: object, label: object, index: int
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "label": "1"}] * 71
    rows[index] = {"prompt": "a", "label": value}
    config = config_of(write(tmp_path / "p.jsonl", rows))
    found = files_of(config, bytewise()).problems(lambda source: LabelUse(is_needed=True, is_compared=True))
    if label is None or isinstance(label, str):
        assert not found
    else:
        assert (
            len(found) == 1
            and f"p.jsonl:{index + 1}: the label in 'label' (data.label_key) is {type(label).__name__}" in found[0]
        )
    assert not files_of(config, bytewise()).problems(lambda source: LabelUse(is_handed_on=True))


@pytest.mark.parametrize("name", ["exact", "numeric", "math", "judge"])
def test_a_verifier_never_compares_with_pythons_view_of_a_label(name: str) -> None:
    args = {"url": "http://localhost:9", "model": "m"} if name == "judge" else {}
    prompt = Prompt(prompt_id=3, token_ids=(1,), text="a", label=["2", "two"])
    with pytest.raises(ValueError, match="label of prompt 3 is list"):
        make_verifier(RewardConfig(name=name, args=args))(request(prompt, "['2', 'two']"))
    assert label_use(RewardConfig(name=name), "any").is_compared


def test_a_function_of_ones_own_gets_labels_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(prompt, response, label, **rest):\n    return float(response in label)\n")
    verifier = make_verifier(RewardConfig(name=f"{tmp_path}/mine.py:reward"))
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="a", label=["2", "two"])
    assert verifier(request(prompt, "two")).value == 1.0


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_keys_with_dots_reach_into_columns(tmp_path: Path, ending: str) -> None:
    rows = [
        {"extra": {"question": "a"}, "reward_model": {"ground_truth": 2.0, "style": "rule"}},
        {"extra": {"question": "b"}, "reward_model": {"style": "rule"}},
    ]
    path = write(tmp_path / f"p.{ending}", rows)
    found = prompts_of(path, bytewise(), prompt_key="extra.question", label_key="reward_model.ground_truth")
    assert [(prompt.text, prompt.label) for prompt in found] == [("a", "2"), ("b", None)]
    assert [prompt.extra for prompt in found] == rows  # the reward still sees the whole columns
    rows = [{"data": {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, "x.y": "e"}]
    path = write(tmp_path / f"q.{ending}", rows)
    keys = {"prompt_key": "data.prompt"}
    source = ExampleSource(path, reader_of(config_of(path, keys, response_key="data.response"), bytewise()), 0)
    assert len(source.first(1)[0]) == 1
    dpo = config_of(path, keys, objective="dpo", chosen_key="data.chosen", rejected_key="data.rejected")
    assert len(ExampleSource(path, reader_of(dpo, bytewise()), 0).first(1)[0]) == 2
    assert prompts_of(path, bytewise(), prompt_key="x.y")[0].text == "e"  # a column of that very name


def test_no_label_anywhere_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "1"}] * 70)

    def checked(key: str, **use: bool) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rlx"):
            return files_of(config_of(path, {"label_key": key}), bytewise()).problems(lambda source: LabelUse(**use))

    assert checked("label", is_handed_on=True) == [] and "no row has a 'label' (data.label_key)" in caplog.text
    (problem,) = checked("anwser", is_handed_on=True)
    assert "no row has a 'anwser' (data.label_key)" in problem
    assert checked("answer", is_handed_on=True) == [] and not caplog.text
    assert checked("label") == [] and not caplog.text


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
OTHER_CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sub", "arguments": {"b": "x"}}}]}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "sub", "parameters": {"properties": {"b": {"type": "string"}}}}},
]
ASKED = {"role": "user", "content": "1+1?"}
RESULT = {"role": "tool", "name": "add", "content": "2"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tools_and_tool_calls_reach_the_template(tmp_path: Path, ending: str) -> None:
    rows = [
        {"messages": [ASKED, CALL, RESULT], "tools": TOOLS},
        {"messages": [ASKED, OTHER_CALL, RESULT], "tools": None},
        {"messages": [{**ASKED, "name": "me"}], "tools": TOOLS[:1]},
    ]
    texts = [prompt.text for prompt in prompts_of(write(tmp_path / f"p.{ending}", rows), bytewise(TEMPLATE))]
    assert texts == [
        f'[tools]{json.dumps(TOOLS)}<end>[user]1+1?<end>[assistant]<call>add{{"a": 1}}<end>[tool]2<end>[assistant]',
        '[user]1+1?<end>[assistant]<call>sub{"b": "x"}<end>[tool]2<end>[assistant]',
        f"[tools]{json.dumps(TOOLS[:1])}<end>[user]1+1?<end>[assistant]",
    ]
    as_text = write(tmp_path / "text.jsonl", [{**rows[0], "tools": json.dumps(TOOLS)}])
    assert prompts_of(as_text, bytewise(TEMPLATE))[0].text == texts[0]
    assert prompts_of(as_text, bytewise(TEMPLATE), tools_key=None)[0].text == texts[0].partition("<end>")[2]
    moved = write(tmp_path / "moved.jsonl", [{"messages": rows[0]["messages"], "meta": {"tools": TOOLS}}])
    assert prompts_of(moved, bytewise(TEMPLATE), tools_key="meta.tools")[0].text == texts[0]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_tool_call_is_an_answer_to_learn(tmp_path: Path, ending: str, template: str) -> None:
    rows = [
        {"messages": [ASKED, CALL], "tools": TOOLS},
        {"messages": [ASKED, CALL, RESULT, {"role": "assistant", "content": "2"}], "tools": TOOLS},
    ]
    tokenizer = bytewise(template)
    tokenizer.eos_token = "<end>"
    one, two = learnt(write(tmp_path / f"p.{ending}", rows), tokenizer, turns="all" if template == TEMPLATE else "last")
    head = f"[tools]{json.dumps(TOOLS)}<end>[user]1+1?<end>[assistant]"
    if template == TEMPLATE:
        assert one == head + '|<call>add{"a": 1}<end>|'
        assert two == head + '|<call>add{"a": 1}<end>|[tool]2<end>[assistant]|2<end>|'
    else:
        assert one.endswith('[assistant]|<call>add{"a": 1}<end>|') and two.endswith("[assistant]|2<end>|")
    rows = [{"messages": [ASKED], "chosen": [CALL], "rejected": [OTHER_CALL], "tools": TOOLS}]
    assert len(learnt(write(tmp_path / f"d.{ending}", rows), tokenizer, objective="dpo")) == 2


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("closes", [False, True])
@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1).map(lambda text: text.encode(errors="ignore").decode()).filter(bool), spelt=st.booleans())
def test_a_text_to_go_on_from_begins_once_and_does_not_end(opens: bool, closes: bool, text: str, spelt: bool) -> None:
    tokenizer = bytewise(opens=opens, closes=closes)
    ids = encode_text("<s>" * spelt + text, tokenizer)
    assert ids[:1] == [tokenizer.bos_token_id] if opens or spelt else ids[:1] != [tokenizer.bos_token_id]
    assert ids.count(tokenizer.bos_token_id) == int(opens or spelt) and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_and_examples_begin_alike(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "response": "b"} for prompt in ("a", "<s>a")]
    path = write(tmp_path / "p.jsonl", rows)
    tokenizer = bytewise(opens=True, closes=True)
    assert learnt(path, tokenizer) == ["<s>a|b</s>|"] * 2
    assert [tokenizer.decode(list(prompt.token_ids)) for prompt in prompts_of(path, tokenizer)] == ["<s>a"] * 2


def test_a_tokenizer_without_a_token_for_the_probe_keeps_its_opening() -> None:
    tokenizer = bytewise(opens=True)
    tokenizer.backend_tokenizer.add_tokens(["ab"])
    assert encode_text("abc", tokenizer)[0] == tokenizer.bos_token_id


PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
BY_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}{% endfor %}{% endif %}<end>{% endfor %}"
)


@pytest.mark.parametrize("template", [PLAIN, "{{ messages | tojson }}", TEMPLATE, BY_PARTS])
def test_parts_of_text_are_text(tmp_path: Path, template: str) -> None:
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("1+1?", PARTS, [*PARTS[:1], "1?"])]
    one, two, three = prompts_of(write(tmp_path / "p.jsonl", rows), bytewise(template))
    assert one.text == two.text == three.text and "1+1?" in one.text


def test_other_parts_are_the_templates_or_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}, *PARTS]}]}])
    assert prompts_of(path, bytewise(BY_PARTS))[0].text == "[user]<image>1+1?<end>"
    with pytest.raises(ValueError, match=r"p\.jsonl:1: message 0 has a part of type 'image'"):
        prompts_of(path, bytewise(PLAIN))


@pytest.mark.parametrize("content", [{}, {"content": None}])
@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        # DeepSeek's asks for null, others concatenate what is there.
        TEMPLATE.replace(
            "{% if m.content %}{{ m.content }}{% endif %}", "{% if m.content is not none %}{{ m.content + '' }}{% endif %}"
        ),
        TEMPLATE.replace(
            "{% if m.content %}{{ m.content }}{% endif %}", "{% if 'content' in m %}{{ m.content + '' }}{% endif %}"
        ),
        TEMPLATE.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content }}"),
    ],
)
def test_a_content_that_is_missing_is_never_written(tmp_path: Path, template: str, content: dict[str, None]) -> None:
    path = write(tmp_path / "p.jsonl", [{"messages": [ASKED, {**CALL, **content}, RESULT]}])
    assert prompts_of(path, bytewise(template))[0].text.startswith('[user]1+1?<end>[assistant]<call>add{"a": 1}<end>[tool]')


def deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


CHAT_ROW = json.dumps({"messages": [ASKED]})
ODD_ROWS = [
    (PLAIN, '{"messages": [{"role": "user", "content": null}]}', "message 0 needs a role and content"),
    (PLAIN, '{"messages": [{"role": "user"}]}', "message 0 needs a role and content"),
    (PLAIN, '{"messages": [{"role": null, "content": "a"}]}', "message 0 needs a role"),
    (PLAIN, '{"messages": [{"role": ["user"], "content": "a"}]}', "message 0 needs a role"),
    (PLAIN, '{"messages": [{"role": "user", "content": 5}]}', "the content must be text or a list of parts, got 5"),
    (PLAIN, '{"messages": [{"role": "user", "content": {"a": 1}}]}', "the content must be text or a list of parts"),
    (PLAIN, '{"messages": [{"role": "user", "content": [5]}]}', "a part of the content must be an object with a type"),
    (PLAIN, '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "a part of type text holds no text"),
    (PLAIN, '{"messages": [{"role": "user", "content": [[]]}]}', "a part of the content must be"),
    (PLAIN, '{"messages": ["hello"]}', "message 0 needs a role"),
    (PLAIN, '{"messages": {"role": "user"}}', "must be a list of role/content objects"),
    (PLAIN, json.dumps({"messages": [ASKED, CALL]}), "no place for them"),
    (PLAIN, json.dumps({"messages": [ASKED], "tools": TOOLS}), "has tools, but the chat template has no place"),
    (TEMPLATE, json.dumps({"messages": [ASKED], "tools": {"name": "add"}}), "must be a list of objects"),
    (TEMPLATE, json.dumps({"messages": [ASKED], "tools": ["add"]}), "must be a list of objects"),
    (TEMPLATE, json.dumps({"messages": [ASKED], "tools": "add"}), "must be a list of tools, or JSON of one"),
    (None, CHAT_ROW, "data.chat_template"),
    ("{{ raise_exception('only even turns') }}", CHAT_ROW, "the chat template refuses the row: only even turns"),
    ("{{ messages[3].content }}", CHAT_ROW, "the chat template refuses the row"),
    ("{{ messages[0].content + 1 }}", CHAT_ROW, "the chat template refuses the row: TypeError"),
    ("{{ 1 / 0 }}", CHAT_ROW, "the chat template refuses the row: ZeroDivisionError"),
    ("{% for m in messages %}", CHAT_ROW, "the chat template refuses the row"),
    ("{{ messages | nonsense }}", CHAT_ROW, "the chat template refuses the row"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHAT_ROW, "the chat template refuses the row: RecursionError"),
    (PLAIN, '{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    (PLAIN, '{"prompt": "a", "label": {"b": ["\\udc00"]}}', "half of a surrogate pair"),
    (PLAIN, '{"prompt": "a", "\\ud800": 1}', "half of a surrogate pair"),
    (PLAIN, f'{{"prompt": "a", "extra": {deep(200)}}}', "nested more than"),
    (PLAIN, f'{{"prompt": "a", "extra": {deep(100_000)}}}', "nested more than"),
    (PLAIN, f'{{"prompt": "a", "extra": {"[" * 100_000}}}', "nested more than"),
    (PLAIN, f'{{"prompt": "a", "label": {"9" * 5000}}}', "not JSON"),
    (PLAIN, "\x00", "not JSON"),
    (PLAIN, "5", "expected a JSON object"),
]


@pytest.mark.parametrize(("template", "line", "words"), ODD_ROWS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("objective", ["none", "sft"])
def test_faults_name_file_and_line(tmp_path: Path, template: str | None, line: str, words: str, objective: str) -> None:
    path = tmp_path / "p.jsonl"
    if objective == "sft":
        row = json.loads(line) if line.startswith('{"messages"') else None
        good, line = '{"prompt": "a", "response": "b"}', line if row is None else json.dumps({**row, "response": "b"})
    else:
        good = '{"prompt": "a"}'
    path.write_text(f"{good}\n\n{line}\n")
    config = config_of(str(path))
    for look in (
        [
            lambda: PromptSource(config.data, bytewise(template), seed=0),
            lambda: files_of(config, bytewise(template)).problems(lambda source: LabelUse())[0],
        ]
        if objective == "none"
        else [
            lambda: ExampleSource(str(path), reader_of(config, bytewise(template)), 0),
            lambda: check_examples(str(path), reader_of(config, bytewise(template))),
        ]
    ):
        try:
            said = str(look())
        except ValueError as error:
            said = str(error)
        assert "p.jsonl:3: " in said and words in said


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text() | st.just("a"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MESSAGE_KEYS = st.sampled_from(["role", "content", "tool_calls", "name", "type", "text"])
ODD_MESSAGES = st.lists(
    st.dictionaries(MESSAGE_KEYS, JSON_VALUES | st.sampled_from(["user", "assistant"]), max_size=4), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(["prompt", "label", "tools", "response", "chosen", "rejected"]), JSON_VALUES),
    messages=st.none() | ODD_MESSAGES | JSON_VALUES,
    template=st.sampled_from([TEMPLATE, PLAIN, BY_PARTS, MARKED, None]),
    objective=st.sampled_from(["none", "sft", "dpo"]),
    level=st.sampled_from([None, "label"]),
)
def test_any_row_is_used_or_refused_with_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    row: dict[str, Any],
    messages: object,
    template: str | None,
    objective: str,
    level: str | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps({**row, "messages": messages}))
    tokenizer, config = bytewise(template), config_of(str(path), {"curriculum_key": level}, objective=objective)
    try:
        if objective == "none":
            PromptSource(config.data, tokenizer, seed=0)
        else:
            ExampleSource(str(path), reader_of(config, tokenizer), 0)
    except ValueError as error:
        assert "any.jsonl" in str(error)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_structs_of_parquet_are_what_their_rows_say(tmp_path: Path, ending: str) -> None:
    rows = [
        {"prompt": "a", "info": {"x": 1, "inner": [{"p": 1}, {"q": "r"}]}, "level": None},
        {"prompt": "b", "info": {"y": "z"}, "level": 2},
    ]
    found = prompts_of(write(tmp_path / f"p.{ending}", rows), bytewise())
    assert [dict(prompt.extra) for prompt in found] == [{key: row[key] for key in ("info", "level")} for row in rows]


def test_a_parquet_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "p.parquet", [{"prompt": str(number) * 50} for number in range(5000)]))
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(400) + whole[600:])
    with pytest.raises(ValueError, match=r"p\.parquet: cannot be read as parquet"):
        prompts_of(str(path), bytewise())
    bytes_of = pyarrow.array([b"\xff\xfe"])
    no_text = pyarrow.StringArray.from_buffers(1, bytes_of.buffers()[1], bytes_of.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": no_text}), path)
    with pytest.raises(ValueError, match=r"p\.parquet: cannot be read as parquet after row 0: .*utf-8"):
        prompts_of(str(path), bytewise())


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("kind", ["text", "chat", "marked"])
def test_a_line_of_ten_megabytes_is_judged_by_its_length(tmp_path: Path, kind: str, overlong: str) -> None:
    text = "<s>" + "ab" * 5_000_000
    chat = [{"role": "user", "content": text}]
    rows: list[dict[str, Any]] = [
        {"prompt": "a"} if kind == "text" else {"messages": [ASKED]},
        {"prompt": text} if kind == "text" else {"messages": chat},
    ]
    path = write(tmp_path / "p.jsonl", [{**row, "response": "b"} for row in rows])
    tokenizer = bytewise({"text": None, "chat": PLAIN, "marked": MARKED}[kind])
    began = time.monotonic()
    source = PromptSource(DataConfig(train=path, max_prompt_tokens=64, overlong=overlong, shuffle=False), tokenizer, seed=0)
    assert len(source) == (1 if overlong == "drop" else 2) and source.drops.total() == 1
    if overlong == "truncate":
        cut = source.next(2)[1]
        assert len(cut.token_ids) == 64 and cut.text.endswith("ab" if kind == "text" else "[assistant]")
        assert cut.text.startswith("<s>") == (kind == "text")
    if kind != "marked" or overlong == "drop":
        examples = ExampleSource(path, reader_of(config_of(path, max_tokens=64, overlong=overlong), tokenizer), 0)
        assert len(examples) == 1 and examples.drops == {"too_long": 1}
    assert time.monotonic() - began < 5


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), repeats=st.integers(1, 200), limit=st.integers(1, 20))
def test_length_alone_never_throws_away_what_fits(text: str, repeats: int, limit: int) -> None:
    tokenizer = bytewise()
    whole = (text * repeats).encode(errors="ignore").decode()
    if is_surely_longer(whole, limit, tokenizer):
        assert len(encode_text(whole, tokenizer)) > limit


def test_long_examples_keep_their_beginning(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b" * 20_000}
    path = write(tmp_path / "p.jsonl", [row])
    assert learnt(path, bytewise(), max_tokens=8, overlong="truncate") == ["a|bbbbbbb|"]
    path = write(tmp_path / "q.jsonl", [{"messages": [ASKED, {"role": "assistant", "content": "b" * 20_000}]}])
    assert learnt(path, bytewise(PLAIN), max_tokens=32, overlong="truncate") == ["[user]1+1?<end>[assistant]|" + "b" * 10 + "|"]
