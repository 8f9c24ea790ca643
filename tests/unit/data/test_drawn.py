"""Drawn tasks: the same pictures from the same seed, right answers, pictures that are as the arguments say."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlx.config.schema import Config, DataConfig, ModelConfig, RewardConfig
from rlx.config.sources import EvaluationSetConfig, SourceConfig
from rlx.data.drawn.canvas import COLOURS, CORNERS, Shape, area_factor, brightness, contrasting, draw_shapes
from rlx.data.drawn.count import Count
from rlx.data.drawn.geometry import Geometry
from rlx.data.drawn.number import Number
from rlx.data.drawn.table import TASKS, read_drawn
from rlx.data.prompts import PromptSource, evaluation_prompts
from rlx.types.rollout import LabelUse
from tests.parts import files_of
from tests.unit.data.test_image_rows import reader

DATA = DataConfig()


def rows_of(task: str, **args: object) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_drawn(task, args, 0, DATA)]


def levels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_follows_from_seed_and_number_alone(task: str) -> None:
    first, again = rows_of(task, size=6, seed=3), rows_of(task, size=9, seed=3)
    assert first == again[:6]
    pictures = [row["images"][0] for seed in (3, 4, 10**9) for row in rows_of(task, size=6, seed=seed)]
    assert len(set(pictures)) == len(pictures)
    for row in first:
        (message,) = row["messages"]
        assert [part["type"] for part in message["content"]] == ["image", "text"] and isinstance(row["label"], str)
        assert Image.open(io.BytesIO(row["images"][0])).mode == "RGB"
    assert len(rows_of(task)) == 500 and all(row["label"] for row in first)


def test_questions_are_chats_with_a_picture_and_evaluation_has_others(tmp_path: Path) -> None:
    args = {"size": 5, "pixels": 56, "max_digits": 1}
    data = DataConfig(sources={"digits": SourceConfig(path="drawn:number", args=args)}, shuffle=False)
    source = PromptSource(data, reader(None).tokenizer, seed=0, images=reader(tmp_path))
    prompts = source.next(5)
    held_out, drops = evaluation_prompts(
        "", EvaluationSetConfig(path="drawn:number", args=args), data, reader(None).tokenizer, 0, reader(tmp_path)
    )
    assert len(prompts) == len(held_out) == 5 and not drops
    assert not {prompt.images[0].key for prompt in prompts} & {prompt.images[0].key for prompt in held_out}
    for prompt in prompts:
        (span,) = prompt.images
        assert span.grid == (1, 4, 4) and len(str(prompt.label)) == 1 and prompt.extra["num_digits"] == 1
        files = prompt.extra["images"]
        assert isinstance(files, list) and len(files) == 1 and Path(files[0]).is_file()


@pytest.mark.parametrize("task", [Count(), Count(pixels=64, max_shapes=9, max_others=7, noise=0.3), Count(min_shapes=3)])
def test_as_many_shapes_are_drawn_as_the_answer_says(task: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Shape]] = []
    monkeypatch.setattr("rlx.data.drawn.count.draw_shapes", lambda *args: seen.append(args[1]) or draw_shapes(*args))
    found: Counter[int] = Counter()
    for number in range(60):
        drawn = task.draw(random.Random(number))
        words = drawn.question.split()
        same = [shape for shape in seen[-1] if (shape.colour, shape.kind + "s") == (words[2], words[3])]
        assert str(len(same)) == drawn.answer
        assert drawn.facts == {"num_shapes": len(same), "num_others": len(seen[-1]) - len(same)}
        assert task.min_shapes <= len(same) <= task.max_shapes
        found[len(same)] += 1
        for index, one in enumerate(seen[-1]):
            assert all(one.radius <= at <= task.pixels - one.radius for at in one.middle)
            for other in seen[-1][:index]:
                assert max(abs(a - b) for a, b in zip(one.middle, other.middle, strict=True)) >= one.radius + other.radius - 1e-6
    assert len(found) == task.max_shapes - task.min_shapes + 1


@pytest.mark.parametrize(
    "task", [Geometry(), Geometry(margin=0.5, min_shapes=8, max_shapes=8, pixels=128), Geometry(margin=0.01)]
)
def test_the_right_shape_is_so_by_the_margin(task: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Shape]] = []
    monkeypatch.setattr("rlx.data.drawn.geometry.draw_shapes", lambda *args: seen.append(args[1]) or draw_shapes(*args))
    axes = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "lowest": (1, 1)}
    asks = set()
    for number in range(120):
        drawn = task.draw(random.Random(number))
        shapes, ask = seen[-1], str(drawn.facts["ask"])
        asks.add(ask)
        assert len({shape.colour for shape in shapes}) == len(shapes) == drawn.facts["num_shapes"]
        if ask == "corners":
            (asked,) = (shape for shape in shapes if f" {shape.colour} " in drawn.question)
            assert drawn.answer == str(CORNERS[asked.kind]) != "0"
            continue
        (right,) = (shape for shape in shapes if shape.colour == drawn.answer)
        others = [shape for shape in shapes if shape is not right]
        if ask == "largest":
            assert all(right.area >= (1 + task.margin) * shape.area * (1 - 1e-9) for shape in others)
        else:
            axis, sign = axes[ask]
            gap = task.margin * task.pixels / len(shapes)
            assert all(sign * (right.middle[axis] - shape.middle[axis]) >= gap - 1e-6 for shape in others)
    assert asks == {"largest", "corners", *axes}
    assert {Geometry(ask="lowest").draw(random.Random(number)).facts["ask"] for number in range(5)} == {"lowest"}


def test_a_shape_covers_its_area_in_its_colour() -> None:
    for kind in CORNERS:
        for colour, levels in COLOURS.items():
            shape = Shape(kind=kind, colour=colour, middle=(50, 50), radius=40, turn=0.3)
            covered = (np.asarray(draw_shapes(100, [shape], random.Random(1))) == levels).all(-1).sum()
            assert covered == pytest.approx(area_factor(kind) * 1600, rel=0.05) == pytest.approx(shape.area, rel=0.05)


def test_numbers_keep_to_their_arguments() -> None:
    lengths = Counter(len(Number(noise=0).draw(random.Random(number)).answer) for number in range(90))
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 15
    digits = {Number(max_digits=1).draw(random.Random(number)).answer for number in range(200)}
    assert digits == set("0123456789")
    for number in range(40):
        exact = Number(pixels=100, min_height=0.5, max_height=0.5, max_digits=1, spread=0, noise=0).draw(random.Random(number))
        levels = np.asarray(exact.picture).astype(int)
        rows, columns = (np.abs(levels - levels[0, 0]).sum(-1) > 60).nonzero()
        assert 45 <= rows.max() - rows.min() + 1 <= 58
        assert abs(rows.max() + rows.min() - 99) <= 4 and abs(columns.max() + columns.min() - 99) <= 4
    assert Number(max_digits=8, min_height=1, max_height=1, tilt=90).draw(random.Random(0)).picture.size == (112, 112)


def test_noise_and_contrast() -> None:
    calm, rough = (Number(noise=noise).draw(random.Random(5)) for noise in (0, 0.5))
    assert calm.answer == rough.answer and len(np.unique(np.asarray(rough.picture)[:9, :9], axis=0)) > 5
    for number in range(50):
        first, second = contrasting(random.Random(number), 100)
        assert abs(brightness(first) - brightness(second)) >= 100
    blank = np.asarray(Number(noise=0).blank(random.Random(0)))
    assert (blank == blank[0, 0]).all()


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("drawn:counts", {}, "drawn:counts: there is no such task; there are drawn:count, drawn:number, drawn:geometry"),
        ("drawn:count", {"shapes": 3}, r"drawn:count: .*do not fit: it takes no shapes; it takes size, seed, pixels, min_shapes"),
        ("drawn:count", {"max_shapes": "3"}, "max_shapes must be a whole number, got '3'"),
        ("drawn:count", {"max_shapes": True}, "max_shapes must be a whole number"),
        ("drawn:count", {"min_shapes": 9}, "min_shapes = 9 is above max_shapes = 8"),
        ("drawn:count", {"max_others": 500}, "max_shapes . max_others = 508 do not fit into pixels = 224, .* room for 196"),
        ("drawn:count", {"size": 0}, "size = 0 must be at least 1"),
        ("drawn:count", {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ("drawn:number", {"pixels": 8}, "pixels must be at least 28, got 8"),
        ("drawn:number", {"noise": 1}, "noise must be below 1, got 1"),
        ("drawn:number", {"min_digits": 5}, "min_digits = 5 is above max_digits = 3"),
        ("drawn:number", {"min_height": 0.9}, "min_height = 0.9 is above max_height = 0.6"),
        ("drawn:geometry", {"ask": "smallest"}, "ask must be one of any, largest, corners, leftmost"),
        ("drawn:geometry", {"ask": 3}, "ask must be text, got 3"),
        ("drawn:geometry", {"max_shapes": 8, "pixels": 100}, "max_shapes = 8 do not fit into pixels = 100: at least 128"),
    ],
)
def test_arguments_that_do_not_fit_are_told_before_the_run(path: str, args: dict[str, object], message: str) -> None:
    config = Config(
        model=ModelConfig(path="m"),
        data=DataConfig(sources={"drawn": SourceConfig(path=path, args=args)}),
        reward=RewardConfig(name="exact"),
    )
    files = files_of(config, reader(None).tokenizer)
    (problem,) = files.problems(lambda source: LabelUse(is_needed=True))
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_pictures_need_a_column_and_a_model_that_sees() -> None:
    with pytest.raises(ValueError, match=r"drawn:count: its pictures need a column: data\.images_key is null"):
        read_drawn("count", {}, 0, DataConfig(images_key=None))
    data = DataConfig(train="drawn:count")
    with pytest.raises(ValueError, match=r"drawn:count: question 0: the row has images .* no vision tower"):
        PromptSource(data, reader(None).tokenizer, seed=0)
