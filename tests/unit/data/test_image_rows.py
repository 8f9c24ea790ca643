"""Rows with images: where they stand among the tokens, and what is told of rows whose places and images do not agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.config.schema import DataConfig, FinetuneConfig
from rlx.config.sources import SourceConfig
from rlx.data.examples import ExampleReader, ExampleSource, check_examples, to_train_batch
from rlx.data.images.intake import ImageIntake
from rlx.data.images.reader import ImageReader
from rlx.data.prompts import PromptSource
from rlx.data.questions import Question, check_questions, read_questions
from rlx.data.rows import EVERY_ROW
from rlx.types.rollout import LabelUse
from tests.unit.data.test_image_intake import encoded, noise, rules

WORDS = [*"abcdefg", "<pad>", "<video>", "<vs>", "<ve>", "<user>", "<assistant>", "<end>", "<unk>"]
IMAGE = 7  # as in rules().vision
SPECIAL = {7: "<pad>", 8: "<video>", 9: "<vs>", 10: "<ve>", 13: "<end>"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<vs><pad><ve>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} "
    "{% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", chat_template=TEMPLATE)


def reader(folder: Path | None, **changes: Any) -> ImageReader:
    intake = ImageIntake(rules(), folder)
    return ImageReader(intake=intake, tokenizer=tokenizer_of(), key="images", drops_bad=False, **changes)


def file_of(folder: Path, *rows: dict[str, object]) -> str:
    for name, size in (("one.png", (56, 56)), ("two.png", (112, 60))):
        (folder / name).write_bytes(encoded(noise(*size)))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


def asked(content: object, **row: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], "label": "a", **row}


def read(folder: Path, *rows: dict[str, object], drops_bad: bool = False, **data: Any) -> tuple[list[Question], dict[str, int]]:
    path = file_of(folder, *rows)
    images = ImageReader(
        intake=ImageIntake(rules(), folder / "kept"), tokenizer=tokenizer_of(), key="images", drops_bad=drops_bad
    )
    questions, counts = read_questions(SourceConfig(path=path), DataConfig(train=path, **data), tokenizer_of(), images=images)
    return questions, dict(counts)


EXPANDED = [11, 9, *[IMAGE] * 4, 10, 0, 1, 12]  # <user> <vs> 2 x 2 tokens <ve> a b <assistant>


@pytest.mark.parametrize(
    "row",
    [
        asked([{"type": "image"}, {"type": "text", "text": " a b"}], images=["one.png"]),
        asked([{"type": "image", "image": "one.png"}, {"type": "text", "text": " a b"}]),
        asked([{"type": "image_url", "image_url": {"url": "one.png"}}, {"type": "text", "text": " a b"}]),
        asked("<image> a b", images=["one.png"]),
        asked("<image> a b", images="one.png"),
        asked("<image> a b", images=[{"bytes": None, "path": "one.png"}]),
    ],
)
def test_every_way_to_name_an_image_gives_the_same_prompt(tmp_path: Path, row: dict[str, object]) -> None:
    (question,), _ = read(tmp_path, row)
    assert list(question.token_ids) == EXPANDED
    (span,) = question.images
    assert (span.start, span.grid) == (2, (1, 4, 4))
    prompt = question.ask(0, "")
    assert prompt.images == (span,) and prompt.text.count("<pad>") == 1
    assert prompt.extra == {"images": [str(tmp_path / "kept" / span.key[:2] / f"{span.key}.png")]}
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image", "text"]  # type: ignore[attr-defined]


def test_text_prompts_and_several_images(tmp_path: Path) -> None:
    text: dict[str, object] = {"prompt": "a <image> b <vs><pad><ve> c", "label": "a", "images": ["one.png", "two.png"]}
    (question, plain), _ = read(tmp_path, text, {"prompt": "a b", "label": "a"})
    assert list(question.token_ids) == [0, 9, *[IMAGE] * 4, 10, 1, 9, *[IMAGE] * 8, 10, 2]
    assert [(span.start, span.grid) for span in question.images] == [(2, (1, 4, 4)), (9, (1, 4, 8))]
    assert not plain.images and list(plain.token_ids) == [0, 1]


def test_limits_count_what_images_take(tmp_path: Path) -> None:
    rows = (asked("<image> a b", images=["one.png"]), asked("a b c d"))
    for overlong in ("drop", "truncate"):
        questions, counts = read(tmp_path, *rows, max_prompt_tokens=len(EXPANDED) - 1, overlong=overlong)
        assert (len(questions), counts) == (1, {"prompt_too_long": 1})
    assert read(tmp_path, *rows, max_prompt_tokens=len(EXPANDED))[1] == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (asked("<image> <image> a", images=["one.png"]), "more places for images .* than the 1 in the column 'images'"),
        (asked("<image> a", images=["one.png", "two.png"]), "holds 2 images, but the chat has places for 1"),
        (asked("a", images=["one.png"]), "holds 1 images, but the chat has places for 0"),
        (asked([{"type": "image"}]), "more places for images .* than the 0"),
        (asked("a <pad> b", images=["one.png"]), "message 0: the text holds <pad>, which stands for an image"),
        (asked("a <pad> b"), "the text holds <pad>"),
        (asked("a <video> b"), "the text holds <video>"),
        (asked([{"type": "video", "video": "a.mp4"}]), "videos are not supported"),
        ({"prompt": "a <pad> b", "label": "a"}, "the text has 1 places for images .* holds 0"),
        ({"prompt": "a b", "label": "a", "images": ["one.png"]}, "the text has 0 places for images .* holds 1"),
        ({"prompt": "a <video>", "label": "a"}, "videos are not supported"),
        (asked("<image> a", images=["three.png"]), r"three\.png: No such file"),
        (asked([{"type": "image", "image": 7}]), "must be a path, bytes or base64, got int"),
    ],
)
def test_faults_are_told_with_file_and_line(tmp_path: Path, row: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{words}"):
        read(tmp_path, asked("a"), row)
    path = file_of(tmp_path, asked("a"), row)
    for images in (reader(None), reader(tmp_path / "kept")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{words}"):
            check_questions(SourceConfig(path=path), DataConfig(train=path), tokenizer_of(), LabelUse(), EVERY_ROW, images)


def test_bad_images_may_be_dropped_and_are_counted(tmp_path: Path) -> None:
    rows = (asked("<image> a", images=["three.png"]), asked("<image> a", images=["one.png"]))
    questions, counts = read(tmp_path, *rows, drops_bad=True)
    assert (len(questions), counts) == (1, {"bad_image": 1})
    with pytest.raises(ValueError, match="holds 2 images"):  # a row that does not agree with itself is never dropped
        read(tmp_path, asked("<image> a", images=["one.png", "two.png"]), drops_bad=True)


def test_a_model_that_sees_nothing_refuses_images(tmp_path: Path) -> None:
    path = file_of(tmp_path, asked("a", images=["one.png"]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the row has images in 'images' \(data\.images_key\), but the model"):
        read_questions(SourceConfig(path=path), DataConfig(train=path), tokenizer_of())
    blind = DataConfig(train=path, images_key=None)
    assert len(read_questions(SourceConfig(path=path), blind, tokenizer_of())[0]) == 1


def test_a_template_without_images_is_told(tmp_path: Path) -> None:
    path = file_of(tmp_path, asked("<image> a", images=["one.png"]))
    images, tokenizer = reader(tmp_path / "kept"), tokenizer_of()
    tokenizer.chat_template = "{% for m in messages %}{% for part in m.content %}{{ part.text }} a {% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="writes 0 placeholders for 1 images"):
        read_questions(SourceConfig(path=path), DataConfig(train=path), tokenizer, images=images)


def test_another_picture_under_the_old_name_is_another_row(tmp_path: Path) -> None:
    path = file_of(tmp_path, asked("<image> a", images=["one.png"]))
    config = DataConfig(train=path)
    first = PromptSource(config, tokenizer_of(), 0, reader(tmp_path / "kept"))
    state = first.state()
    PromptSource(config, tokenizer_of(), 0, reader(tmp_path / "kept")).load_state(state)
    (tmp_path / "one.png").write_bytes(encoded(noise(56, 56, seed=5)))
    with pytest.raises(ValueError, match="is not what it was"):
        PromptSource(config, tokenizer_of(), 0, reader(tmp_path / "kept")).load_state(state)


def examples(folder: Path, *rows: dict[str, object], objective: str = "sft", **finetune: Any) -> ExampleSource:
    path = file_of(folder, *rows)
    made = ExampleReader(
        data=DataConfig(train=path, shuffle=False),
        finetune=FinetuneConfig(objective=objective, **finetune),
        tokenizer=tokenizer_of(),
        images=reader(folder / "kept"),
    )
    assert check_examples(path, made) == len(rows)
    return ExampleSource(path, made, 0)


def test_examples_have_images_in_their_prompts(tmp_path: Path) -> None:
    chat = [*asked("<image> a b")["messages"], {"role": "assistant", "content": "c d"}]  # type: ignore[misc]
    rows: tuple[dict[str, object], ...] = (
        {"messages": chat, "images": ["two.png"]},
        {"prompt": "a <image>", "response": " b", "images": ["one.png"]},
    )
    ((first,), (second,)) = examples(tmp_path, *rows).next(2)
    assert list(first.token_ids) == [11, 9, *[IMAGE] * 8, 10, 0, 1, 12, 2, 3, 13]
    assert list(first.loss_mask) == [0] * 14 + [1, 1, 1]
    assert list(second.token_ids) == [0, 9, *[IMAGE] * 4, 10, 1, 13] and list(second.loss_mask) == [0] * 7 + [1, 1]
    batch = to_train_batch([(first,), (second,)])
    assert batch.images is not None
    assert [span.start for row in range(2) for span in batch.images.of_sequence(row)] == [2, 2]


def test_pairs_share_the_images_of_their_prompt_and_are_never_cut(tmp_path: Path) -> None:
    pair = asked("<image> a", images=["one.png"], chosen="b c d e f g", rejected="c")
    ((chosen, rejected),) = examples(tmp_path, pair, objective="dpo").next(1)
    assert chosen.images == rejected.images and len(chosen.images) == 1
    with pytest.raises(ValueError, match="too_long 1"):
        examples(tmp_path, pair, objective="dpo", max_tokens=len(rejected.token_ids), overlong="truncate")
