"""Mixtures, curricula, truncation and tasks; resume bit for bit under all of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.config.schema import Config, DataConfig, ModelConfig, RewardConfig
from rlx.config.sources import EvaluationSetConfig, SourceConfig
from rlx.data.mixture import next_source, shares_of
from rlx.data.prompts import PromptSource, evaluation_prompts
from rlx.types.rollout import LabelUse
from tests.parts import files_of

WORDS = ["<s>", "<unk>", "<system>", "<user>", "<assistant>", *"abcdefgh"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


def tokenizer_of() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", chat_template=TEMPLATE)


TOKENIZER = tokenizer_of()
NEEDS = LabelUse(is_needed=True)


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, num: int) -> str:
    return write(path, *({"prompt": "a b", "label": f"{path.stem}{index}", "hard": -index} for index in range(num)))


@given(st.lists(st.floats(0.01, 100).map(lambda weight: round(weight, 2)), min_size=1, max_size=6))
def test_every_source_has_its_share_to_within_one_after_any_number_of_draws(weights: list[float]) -> None:
    shares, counts = shares_of(weights), [0] * len(weights)
    assert sum(shares) == 1
    for draw in range(1, 200):
        counts[next_source(shares, counts)] += 1
        assert all(abs(count - draw * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_weights_that_are_no_weights() -> None:
    with pytest.raises(ValueError, match="above 0"):
        shares_of([1.0, 0.0])


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 1.0, 2.5, 3.0]), min_size=3, max_size=3),
    stop=st.integers(0, 60),
    shuffle=st.booleans(),
    levels=st.none() | st.integers(1, 3),
)
def test_resume_continues_bit_for_bit(
    sizes: list[int], weights: list[float], stop: int, shuffle: bool, levels: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [numbered(Path(folder) / f"s{index}.jsonl", size) for index, size in enumerate(sizes)]
        sources = {Path(path).stem: SourceConfig(path=path, weight=weights[index]) for index, path in enumerate(paths)}
        config = DataConfig(
            sources=sources,
            shuffle=shuffle,
            curriculum_key=levels and "hard",
            curriculum_epochs=levels or 1,  # type: ignore[arg-type]
        )
        whole = PromptSource(config, TOKENIZER, seed=2).next(80)
        first = PromptSource(config, TOKENIZER, seed=2)
        head = first.next(stop)
        second = PromptSource(config, TOKENIZER, seed=2)
        second.load_state(json.loads(json.dumps(first.state())))
        assert head + second.next(80 - stop) == whole
        for name, size in zip(sources, sizes, strict=True):
            dealt = [prompt.label for prompt in whole if prompt.source == name]
            for start in range(0, len(dealt) - size + 1, size):
                assert len(set(dealt[start : start + size])) == size  # an epoch holds each question once


def test_a_mixture_names_its_sources_and_keeps_its_own_columns(tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", {"question": "c", "answer": 7}, {"question": "d", "answer": 8})
    sources = {
        "easy": SourceConfig(path=numbered(tmp_path / "easy.jsonl", 4), weight=3),
        "other": SourceConfig(path=other, prompt_key="question", label_key="answer"),
    }
    source = PromptSource(DataConfig(sources=sources), TOKENIZER, seed=0)
    prompts = source.next(16)
    assert Counter(prompt.source for prompt in prompts) == {"easy": 12, "other": 4}
    assert {prompt.label for prompt in prompts if prompt.source == "other"} == {"7", "8"}
    assert [prompt.prompt_id for prompt in prompts] == list(range(16))
    assert source.metrics() == {"data/epoch/easy": 3.0, "data/epoch/other": 2.0}


def test_two_sources_of_one_file_have_orders_of_their_own(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 12)
    config = DataConfig(sources={"a": SourceConfig(path=path), "b": SourceConfig(path=path)})
    prompts = PromptSource(config, TOKENIZER, seed=0).next(24)
    first, second = ([prompt.label for prompt in prompts if prompt.source == name] for name in "ab")
    assert sorted(first, key=str) == sorted(second, key=str) and first != second


def test_a_curriculum_goes_from_low_to_high_then_shuffles(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "label": i, "meta": {"level": i // 4}} for i in reversed(range(12))]
    config = DataConfig(train=write(tmp_path / "p.jsonl", *rows), curriculum_key="meta.level", curriculum_epochs=2)
    labels = [int(prompt.label or 0) for prompt in PromptSource(config, TOKENIZER, seed=0).next(36)]
    epochs = [labels[start : start + 12] for start in (0, 12, 24)]
    assert [label // 4 for label in epochs[0]] == [label // 4 for label in epochs[1]] == [0] * 4 + [1] * 4 + [2] * 4
    assert epochs[0] != epochs[1]  # equal levels in another order each time
    assert sorted(epochs[2]) == list(range(12)) and [label // 4 for label in epochs[2]] != [0] * 4 + [1] * 4 + [2] * 4
    ordered = PromptSource(replace(config, shuffle=False), TOKENIZER, seed=0).next(12)
    assert [prompt.label for prompt in ordered] == [str(i) for i in (3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8)]


@pytest.mark.parametrize("level", [None, "hard", True, float("nan"), 10**400, {"level": 1}])
def test_a_level_that_is_no_number_is_named(tmp_path: Path, level: object) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "level": 1}, {"prompt": "a", "level": level})
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the curriculum's column 'level' .*must hold a finite number"):
        PromptSource(DataConfig(train=path, curriculum_key="level"), TOKENIZER, seed=0)


def test_a_folder_is_read_without_its_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "b"})
    write(tmp_path / "a.jsonl", {"prompt": "a"})
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    source = PromptSource(DataConfig(train=str(tmp_path), shuffle=False), TOKENIZER, seed=0)
    assert [prompt.text for prompt in source.next(2)] == ["a", "b"]


def test_truncation_keeps_the_end_and_the_opening_token_and_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a b c d e"}, {"prompt": "<s> a b c d"}, {"prompt": "a b c"})
    config = DataConfig(train=path, max_prompt_tokens=3, overlong="truncate", shuffle=False)
    source = PromptSource(config, TOKENIZER, seed=0)
    assert [prompt.text for prompt in source.next(3)] == ["c d e", "<s> c d", "a b c"]
    assert source.drops == {"prompt_truncated": 2}
    assert PromptSource(replace(config, max_prompt_tokens=1), TOKENIZER, seed=0).next(2)[1].text == "d"


def test_a_system_prompt_opens_chats_that_have_none(tmp_path: Path) -> None:
    mine: dict[str, object] = {"messages": [{"role": "system", "content": "h"}, {"role": "user", "content": "a"}]}
    theirs: dict[str, object] = {"messages": [{"role": "user", "content": "a"}]}
    config = DataConfig(train=write(tmp_path / "p.jsonl", mine, theirs, {"prompt": "b"}), system_prompt="g", shuffle=False)
    texts = [prompt.text for prompt in PromptSource(config, TOKENIZER, seed=0).next(3)]
    assert texts == [
        "<system> h <user> a <assistant>",
        "<system> g <user> a <assistant>",
        "<system> g <user> b <assistant>",
    ]
    chat = DataConfig(train=config.train, system_prompt="", shuffle=False)
    assert PromptSource(chat, TOKENIZER, seed=0).next(3)[2].text == "<user> b <assistant>"


def test_a_changed_mixture_does_not_resume(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 4)
    two = DataConfig(sources={"a": SourceConfig(path=path), "b": SourceConfig(path=path)})
    state = PromptSource(two, TOKENIZER, seed=0).state()
    with pytest.raises(ValueError, match=r"data\.sources are a, but were a, b when"):
        PromptSource(DataConfig(sources={"a": SourceConfig(path=path)}), TOKENIZER, seed=0).load_state(state)
    heavier = DataConfig(sources={"a": SourceConfig(path=path, weight=2.0), "b": SourceConfig(path=path)})
    with pytest.raises(ValueError, match=r"'weight': 1\.0.* then, .*'weight': 2\.0"):
        PromptSource(heavier, TOKENIZER, seed=0).load_state(state)
    with pytest.raises(ValueError, match="shuffle"):
        PromptSource(replace(two, shuffle=False), TOKENIZER, seed=0).load_state(state)


def test_evaluation_prompts_come_in_file_order(tmp_path: Path) -> None:
    data = DataConfig(train=numbered(tmp_path / "p.jsonl", 6), curriculum_key="absent")
    one = EvaluationSetConfig(path=str(data.train), max_prompts=3)
    prompts, drops = evaluation_prompts("held_out", one, data, TOKENIZER, 0)
    assert [prompt.label for prompt in prompts] == ["p0", "p1", "p2"] and not drops
    assert {prompt.source for prompt in prompts} == {"held_out"}


def test_tasks_of_reasoning_gym_are_made_from_their_seed() -> None:
    pytest.importorskip("reasoning_gym")
    args = {"size": 5, "max_terms": 3, "seed": 7}
    config = DataConfig(sources={"sums": SourceConfig(path="reasoning-gym:chain_sum", args=args)}, shuffle=False)
    prompts, again = (PromptSource(config, TOKENIZER, seed=seed).next(5) for seed in (0, 1))
    assert prompts == again
    for prompt in prompts:
        expression = str(prompt.extra["expression"])
        assert expression in prompt.text and prompt.label == str(eval(expression))
    level = replace(config, sources={"sums": replace(config.sources["sums"], curriculum_key="num_terms")})
    terms = [prompt.extra["num_terms"] for prompt in PromptSource(level, TOKENIZER, seed=0).next(5)]
    assert terms == sorted(terms, key=int)  # type: ignore[arg-type]


def test_training_and_evaluation_share_no_question_of_a_task() -> None:
    pytest.importorskip("reasoning_gym")
    data = DataConfig(train="reasoning-gym:chain_sum")
    source = PromptSource(data, TOKENIZER, 0)
    one = EvaluationSetConfig(path="reasoning-gym:chain_sum", max_prompts=50)
    held_out, _ = evaluation_prompts("", one, data, TOKENIZER, 0)
    shared = {prompt.text for prompt in held_out} & {prompt.text for prompt in source.next(len(source))}
    assert len(source) == 500 and len(shared) < 5  # small sums repeat by chance


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("reasoning-gym:chain_sums", {}, "has no such task; it has .*chain_sum"),
        ("reasoning-gym:chain_sum", {"terms": 3}, "do not fit.*terms"),
        ("reasoning-gym:chain_sum", {"min_terms": 5, "max_terms": 2}, "do not fit"),
        ("FILE", {"size": 3}, "only a task takes args"),
        ("gone.jsonl", {}, "no such file gone.jsonl"),
    ],
)
def test_a_source_that_cannot_be_used_is_found_before_the_run(
    tmp_path: Path, path: str, args: dict[str, object], message: str
) -> None:
    pytest.importorskip("reasoning_gym")
    good = numbered(tmp_path / "p.jsonl", 3)
    bad = SourceConfig(path=good if path == "FILE" else path, args=args)
    data = DataConfig(sources={"good": SourceConfig(path=good), "bad": bad})
    config = Config(model=ModelConfig(path="m"), data=data, reward=RewardConfig(name="exact"))
    (problem,) = files_of(config, TOKENIZER).problems(lambda source: NEEDS)
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_a_source_without_labels_is_found_where_the_reward_compares_with_them(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.jsonl", {"prompt": "a", "answer": 3}, {"prompt": "b", "answer": 4})
    data = DataConfig(sources={"good": SourceConfig(path=numbered(tmp_path / "p.jsonl", 3)), "bare": SourceConfig(path=bare)})
    config = Config(model=ModelConfig(path="m"), data=data, reward=RewardConfig(name="exact"))
    (problem,) = files_of(config, TOKENIZER).problems(lambda source: NEEDS)
    assert problem.endswith("bare.jsonl: the reward compares with labels, but the rows have no 'label' (data.label_key)")
    assert files_of(config, TOKENIZER).problems(lambda source: LabelUse(is_needed=source == "good")) == []
    named = replace(data, sources={**data.sources, "bare": replace(data.sources["bare"], label_key="answer")})
    assert files_of(replace(config, data=named), TOKENIZER).problems(lambda source: NEEDS) == []
