"""Rows to masked sequences and pairs: chat masking, what is dropped and counted, what is an error, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.config.schema import Config, DataConfig, FinetuneConfig, ModelConfig, RunConfig
from rlx.data.chat_mask import MaskedTokens, continuation, masked_tokens
from rlx.data.examples import Example, ExampleSource, check_examples, plan_examples, to_train_batch
from rlx.data.order import EpochOrder
from rlx.data.plan import Budget
from rlx.types.layout import ParallelDims
from rlx.types.rollout import ImageSpan
from tests.parts import reader_of

WORDS = ["a", "b", "c", "d", "<user>", "<assistant>", "<system>", "<end>", "~", "<unk>", "<think>"]
# As ChatML, where a line break follows the end of every turn.
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> ~ {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %} ~ {% else %}{{ m.content }} <end> ~ {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Thoughts of earlier turns are taken out, as by the templates of models that reason.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' and loop.last %}<think> {% endif %}{{ m.content }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
TWO_TURNS = [
    {"role": "system", "content": "d"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def tokenizer_of(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", chat_template=template)


def source_of(
    folder: Path, rows: list[dict[str, Any]], template: str | None = CHAT, ending: str = "jsonl", **finetune: Any
) -> ExampleSource:
    path = folder / f"rows.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(path, **{"objective": "sft", **finetune})
    reader = reader_of(config, tokenizer_of(template))
    source: ExampleSource | None = None
    try:
        source = ExampleSource(str(path), reader, config.run.seed)
    finally:
        # The look before a run finds what the run would.
        if source is None:
            with pytest.raises(ValueError):
                check_examples(str(path), reader)
        else:
            check_examples(str(path), reader)
    return source


def config_of(path: Path, **finetune: Any) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(train=str(path)),
        finetune=FinetuneConfig(**finetune),
        run=RunConfig(seed=3),
    )


def shown(sequence: MaskedTokens) -> str:
    """The words, those to learn in brackets."""
    words = [WORDS[token] for token in sequence.token_ids]
    return " ".join(f"[{word}]" if learnt else word for word, learnt in zip(words, sequence.loss_mask, strict=True))


def only(source: ExampleSource) -> list[str]:
    (example,) = source.first(2)
    return [shown(side) for side in example]


@pytest.mark.parametrize("template", [CHAT, MARKED])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_only_the_assistants_words_are_learnt(tmp_path: Path, template: str, ending: str) -> None:
    (text,) = only(source_of(tmp_path, [{"messages": TWO_TURNS}], template, ending))
    assert text == (
        "<system> d <end> ~ <user> a b <end> ~ <assistant> [b] [c] [<end>] ~ <user> c <end> ~ <assistant> [d] [<end>]"
    )


@pytest.mark.parametrize("template", [CHAT, MARKED, FORGETFUL])
def test_or_those_of_the_last_turn(tmp_path: Path, template: str) -> None:
    (text,) = only(source_of(tmp_path, [{"messages": TWO_TURNS}], template, turns="last"))
    assert "assistant> b c" in text and text.endswith("[d] [<end>]") and text.count("[") == 2 + ("[<think>]" in text)


def test_what_comes_after_the_last_answer_is_left_out(tmp_path: Path) -> None:
    (text,) = only(source_of(tmp_path, [{"messages": [*TWO_TURNS[1:3], {"role": "user", "content": "c"}]}]))
    assert text == "<user> a b <end> ~ <assistant> [b] [c] [<end>]"


def test_a_prompt_is_tokenised_as_an_engine_gets_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    source = source_of(tmp_path, [{"messages": TWO_TURNS}], turns="last")
    opening = tokenizer.apply_chat_template(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True)
    ((sequence,),) = source.first(1)
    assert list(sequence.token_ids)[: -sum(sequence.loss_mask)] == tokenizer.encode(opening, add_special_tokens=False)


def test_tokenizers_that_begin_texts_with_a_space_do_not_put_one_into_the_middle() -> None:
    """As Llama 2's: alone, " b" is two spaces and b. A border inside a token of the whole is kept all the same."""
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁b": 3}, merges=[("▁", "b")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.encode("a") == [0, 1] and tokenizer.encode(" b") == [0, 3]
    assert continuation([0, 1], "a", " b", tokenizer, opens=False) == [3]
    assert continuation([0, 1, 0], "a ", "b", tokenizer, opens=False) == [3]


def test_a_template_that_rewrites_turns_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .* message 2 .*generation.*finetune\.turns=last"):
        source_of(tmp_path, [{"messages": TWO_TURNS}], FORGETFUL)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b", "response": "c"},
        {"messages": None, "prompt": "a b", "response": "c <end>"},
    ],
)
def test_text_ends_with_the_end_of_sequence_once(tmp_path: Path, row: dict[str, Any]) -> None:
    assert only(source_of(tmp_path, [row], template=None)) == ["a b [c] [<end>]"]


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_an_answer_to_a_chat_is_the_assistants_next_turn(tmp_path: Path, key: str) -> None:
    row = {key: [{"role": "user", "content": "a"}], "response": "b"}
    assert only(source_of(tmp_path, [row])) == ["<user> a <end> ~ <assistant> [b] [<end>]"]


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c d")))
AS_CHAT = ["<user> a <end> ~ <assistant> [b] [<end>]", "<user> a <end> ~ <assistant> [c] [d] [<end>]"]


@pytest.mark.parametrize("objective", ["dpo", "ipo", "rm"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c d"}, ["a [b] [<end>]", "a [c] [d] [<end>]"]),
        ({"messages": [USER], "chosen": "b", "rejected": "c d"}, AS_CHAT),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, AS_CHAT),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, AS_CHAT),
        ({"prompt": "said again", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, AS_CHAT),
    ],
)
def test_pairs(tmp_path: Path, objective: str, row: dict[str, Any], expected: list[str]) -> None:
    assert only(source_of(tmp_path, [row], objective=objective)) == expected


def test_pairs_take_the_last_turn(tmp_path: Path) -> None:
    row = {"chosen": TWO_TURNS, "rejected": [*TWO_TURNS[:-1], BAD]}
    chosen, rejected = only(source_of(tmp_path, [row], objective="dpo"))
    assert chosen.count("[") == 2 and rejected.endswith("<assistant> [c] [d] [<end>]") and rejected.count("[") == 3


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": "  "},
        {"prompt": "a a a a a", "response": "b b b"},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
    ]
    source = source_of(tmp_path, rows, max_tokens=8)
    assert source.drops == Counter(empty_answer=4, too_long=1) and len(source) == 1 and source.num_truncated == 0


def test_pairs_of_equal_sides_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": chosen, "rejected": "c"} for chosen in ("b", "c", "c <end>", "")]
    source = source_of(tmp_path, rows, objective="dpo")
    assert source.drops == Counter(equal_sides=2, empty_answer=1) and len(source) == 1


def test_long_ones_are_cut_on_demand(tmp_path: Path) -> None:
    rows = [{"prompt": "a a", "response": "b c d"}, {"prompt": "a", "response": "b"}, {"prompt": "a a a a", "response": "b"}]
    source = source_of(tmp_path, rows, overlong="truncate", max_tokens=4)
    assert [shown(side) for (side,) in source.first(9)] == ["a a [b] [c]", "a [b] [<end>]"]
    assert source.num_truncated == 1 and source.drops == Counter(too_long=1)
    rows = [{"prompt": "a a", "chosen": f"b c {last}", "rejected": "b c d"} for last in ("a", "b", "c")]
    with pytest.raises(ValueError, match=r"all 3 rows are dropped \(equal_sides 3\)"):
        source_of(tmp_path, rows, objective="dpo", overlong="truncate", max_tokens=4)


def test_a_cut_between_turns_ends_with_an_answer(tmp_path: Path) -> None:
    (text,) = only(source_of(tmp_path, [{"messages": TWO_TURNS[1:]}], overlong="truncate", max_tokens=11))
    assert text == "<user> a b <end> ~ <assistant> [b] [c] [<end>]"


@pytest.mark.parametrize(
    ("rows", "finetune", "words"),
    [
        ([], {}, "holds no rows"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], {}, "rows.jsonl:2: neither a chat in 'messages' nor an answer"),
        ([{"response": "b"}], {}, "is the answer to no prompt"),
        ([{"prompt": None, "response": "b"}], {}, "the columns are prompt (null here), response"),
        ([{"prompt": "", "response": "b"}], {}, "the prompt has no tokens"),
        ([{"prompt": "a", "chosen": "b"}], {"objective": "dpo"}, "no column 'rejected'"),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], {"objective": "rm"}, "no column 'rejected'"),
        ([{"chosen": "b", "rejected": "c"}], {"objective": "dpo"}, "is the answer to no prompt"),
        ([{"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}], {"objective": "dpo"}, "give the prompt as messages too"),
        ([{"prompt": "a", "chosen": 1, "rejected": 2}], {"objective": "dpo"}, "'chosen' must be a list of role/content"),
        ([{"messages": [{"role": "user"}]}], {}, "message 0 needs a role and content"),
        ([{"messages": []}], {}, "must be a list of role/content objects"),
        ([{"messages": [GOOD, USER, GOOD]}], {}, "the chat begins with the assistant"),
        ([{"prompt": "a", "response": "b b b b"}], {"max_tokens": 3}, "all 1 rows are dropped (too_long 1); finetune.max_tokens"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_its_place(
    tmp_path: Path, rows: list[dict[str, Any]], finetune: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        source_of(tmp_path, rows, **finetune)
    assert words in str(caught.value) and "rows.jsonl" in str(caught.value)


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*data\.chat_template"):
        source_of(tmp_path, [{"messages": TWO_TURNS}], template=None)


def numbered(num: int) -> list[dict[str, Any]]:
    return [{"prompt": "a " * (index + 1), "response": "b"} for index in range(num)]


@pytest.mark.parametrize("stop", [0, 3, 10, 11, 26])
def test_an_interrupted_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path, stop: int) -> None:
    def drawn(source: ExampleSource, num: int) -> list[int]:
        return [len(side.token_ids) for (side,) in source.next(num)]

    whole = drawn(source_of(tmp_path, numbered(10)), 40)
    assert sorted(whole[:10]) == sorted(whole[10:20]) != whole[:10] != whole[10:20]
    first = source_of(tmp_path, numbered(10))
    assert drawn(first, stop) == whole[:stop] and first.epochs == pytest.approx(stop / 10)
    second = source_of(tmp_path, numbered(10))
    second.load_state(json.loads(json.dumps(first.state())))
    assert drawn(second, 40 - stop) == whole[stop:]
    with pytest.raises(ValueError, match=r"data\.train: .*'num_rows': 10.* then, .*'num_rows': 9"):
        source_of(tmp_path, numbered(9)).load_state(first.state())


def test_without_shuffling_rows_come_in_file_order() -> None:
    assert EpochOrder(3, seed=1, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


LAYOUTS = st.builds(
    ParallelDims,
    world_size=st.sampled_from([8, 16]),
    cp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2]),
    vpp=st.just(1),
)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), LAYOUTS, st.integers(24, 80))
def test_the_sides_of_a_pair_stay_side_by_side(lengths: list[tuple[int, int]], dims: ParallelDims, max_tokens: int) -> None:
    pairs: list[Example] = [tuple(masked_tokens([1] * n, [0] * (n - 1) + [1]) for n in pair) for pair in lengths]
    (part,) = plan_examples(pairs, dims=dims, budget=Budget(max_tokens=max_tokens)).mini_batches
    samples = to_train_batch(pairs)
    members = [index for rank in part.micro_batches for ids in rank for index in ids]
    assert sorted(members) == list(range(len(samples))) and part.num_sequences == len(samples)
    assert part.num_loss_tokens == sum(sample.num_loss_tokens for sample in samples)
    for rank in part.micro_batches:
        for ids in rank:
            assert all(chosen % 2 == 0 and rejected == chosen + 1 for chosen, rejected in zip(ids[::2], ids[1::2], strict=True))
            padded = [-(-len(samples[i].token_ids) // dims.sequence_multiple) * dims.sequence_multiple for i in ids]
            assert sum(padded) <= max_tokens


def test_the_sides_of_a_pair_share_the_budget_of_their_image() -> None:
    """Two pairs, each about an image of 16 patches that both of its sides show."""
    spans = [(ImageSpan(key=key * 64, start=0, grid=(1, 4, 4)),) for key in "ab"]
    pairs: list[Example] = [
        tuple(replace(masked_tokens([1] * 6, [0] * 5 + [1]), images=images) for _ in range(2)) for images in spans
    ]
    for max_patches, wanted in ((31, 2), (32, 1)):
        budget = Budget(max_tokens=80, max_patches=max_patches)
        (part,) = plan_examples(pairs, dims=ParallelDims(world_size=1), budget=budget).mini_batches
        assert len(part.micro_batches[0]) == wanted
    with pytest.raises(ValueError, match=r"have 16 patches, more than batching.max_patches_per_micro_batch = 15"):
        plan_examples(pairs, dims=ParallelDims(world_size=1), budget=Budget(max_tokens=80, max_patches=15))


def test_sequences_are_kept_small(tmp_path: Path) -> None:
    ((sequence,),) = source_of(tmp_path, numbered(1)).first(1)
    assert memoryview(sequence.token_ids).itemsize == 4 and isinstance(sequence.loss_mask, bytes)  # type: ignore[arg-type]


def test_other_rows_or_another_template_are_refused_on_resume(tmp_path: Path) -> None:
    state = source_of(tmp_path, numbered(5)).state()
    rows = numbered(5)
    with pytest.raises(ValueError, match=r"data\.train: .*'rows'.*begin a new run"):
        source_of(tmp_path, [*rows[1:], rows[0]]).load_state(state)
    with pytest.raises(ValueError, match=r"data\.chat_template: "):
        source_of(tmp_path, rows, template=MARKED).load_state(state)
    older = {key: value for key, value in state.items() if key in ("epoch", "offset", "num_rows")}
    source_of(tmp_path, [*rows[1:], rows[0]]).load_state(older)  # knew the number of rows alone
