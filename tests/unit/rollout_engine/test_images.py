"""Images in the embedded engine, without HTTP; ``tests/sglang/test_vision.py`` asks both kinds of engines over it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from rlx.rollout.embedded.batch import DecodeBatch
from rlx.rollout.embedded.images import Sight
from rlx.rollout.embedded.model import LanguageModel, ModelInfo
from rlx.rollout.embedded.protocol import RequestParser
from rlx.rollout.embedded.sequence import Sequence
from rlx.rollout.embedded.weights import WeightStore
from rlx.rollout.images import ImageStore, PlacedImages
from rlx.types.precision import FP32
from tests.models_vision import END, IMAGE, MERGE, START, VOCAB, expand, make, save, scores, vision_of, write_picture

FAMILIES = ["qwen2_5_vl", "qwen2_vl"]


@pytest.fixture(scope="module", params=FAMILIES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, LanguageModel]:
    model = make(request.param, random.randrange(1000), tied=request.param == "qwen2_vl")
    return model, LanguageModel(save(model, tmp_path_factory.mktemp("vision")), FP32, "cpu")


def info(**more: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "path": "m",
        "model_type": "t",
        "architectures": (),
        "vocab_size": VOCAB,
        "context_length": 99,
        "end_ids": frozenset(),
        "dtype": "fp32",
        "device": "cpu",
    }
    return ModelInfo(**{**fields, **more})


def parse(model: ModelInfo, **body: object) -> list[Sequence]:
    fields = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 5, "temperature": 0}, "return_logprob": True}
    return RequestParser(model, None, lambda: 1).parse({**fields, **body}).sequences


def test_a_model_of_text_refuses_images_and_one_of_scores_does_too() -> None:
    with pytest.raises(ValueError, match="image_data is not supported: the model sees no images"):
        parse(info(), image_data=["rlx_images:{}"])
    scorer = RequestParser(info(generates=False), None, lambda: 1)
    with pytest.raises(ValueError, match="image_data is not supported by reward models"):
        scorer.parse_scored({"input_ids": [1], "image_data": ["rlx_images:{}"]})


@pytest.mark.parametrize("images", ["iVBOR", ["iVBOR"], [{"url": "x"}], {"a": 1}])
def test_another_form_of_images_is_refused(images: object) -> None:
    with pytest.raises(ValueError, match=r"the embedded engine takes a list of texts 'rlx_images:\.\.\.'"):
        parse(info(vision=vision_of(make())), image_data=images)


def test_each_prompt_of_several_has_its_own_images(tmp_path: Path) -> None:
    vision = vision_of(make())
    picture = write_picture(tmp_path, 1, 1, 2)
    ids, spans = expand([[1], picture])
    entries = PlacedImages(store=ImageStore(folder=tmp_path, vision=vision), spans=spans).entries(as_data=False)
    found = parse(info(vision=vision), input_ids=[ids, [1, IMAGE]], image_data=[entries, None])
    assert [len(sequence.pictures) for sequence in found] == [1, 0]
    assert found[0].pictures[0].pixels.shape == (2 * MERGE**2, 1176)
    with pytest.raises(ValueError, match="image_data is a list of 1 for 2"):
        parse(info(vision=vision), input_ids=[ids, [1, IMAGE]], image_data=[entries])
    several = {"max_new_tokens": 5, "n": 3}
    assert [
        len(one.pictures) for one in parse(info(vision=vision), input_ids=ids, image_data=entries, sampling_params=several)
    ] == [1] * 3


def test_prompts_of_one_text_and_other_images_are_others(seen: tuple[PreTrainedModel, LanguageModel], tmp_path: Path) -> None:
    """And images that several show are computed once."""
    model, engine = seen
    store = ImageStore(folder=tmp_path, vision=vision_of(model))
    pictures = [write_picture(tmp_path, seed, 2, 3) for seed in (1, 2)]
    rows = [expand([[5, 6], picture, [7, IMAGE, START, END, 8]]) for picture in pictures]
    rows += [rows[0], ([9, 10, IMAGE], ()), expand([[3] * 9, pictures[1], pictures[0], [4]])]
    sequences = []
    for ids, spans in rows:
        entries = PlacedImages(store=store, spans=spans).entries(as_data=True)
        sequences += parse(engine.info, input_ids=ids, image_data=entries)
    sequences = [replace(sequence, params=replace(sequence.params, stop_ids=frozenset())) for sequence in sequences]
    computed: list[int] = []
    tower: Any = engine.module.get_submodule("model.visual")
    handle = tower.register_forward_pre_hook(lambda module, given: computed.append(len(given[0])))
    with torch.inference_mode():
        batch = DecodeBatch(engine)
        batch.admit(sequences)
        while len(batch):
            batch.step()
    handle.remove()
    assert computed == [2 * 2 * 3 * MERGE**2]
    for (ids, spans), sequence in zip(rows, sequences, strict=True):
        wanted = scores(model, [*ids, *sequence.output_ids], spans, tmp_path)[-5:]
        assert sequence.output_logprobs == pytest.approx(wanted, abs=2e-5)
    assert sequences[0].output_ids == sequences[2].output_ids
    assert sequences[0].output_logprobs != pytest.approx(sequences[1].output_logprobs, abs=1e-3)


def test_weights_come_by_the_names_of_the_folder(seen: tuple[PreTrainedModel, LanguageModel]) -> None:
    _, engine = seen
    store = WeightStore(engine, 10.0)
    with safe_open(Path(engine.info.path) / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert names <= {name for name, _ in store.named_parameters()} and any(name.startswith("visual.") for name in names)
        store.load_weights([(name, file.get_tensor(name) + 1) for name in sorted(names)[:9]])
        store.load_folder(Path(engine.info.path))
        for name in names:
            assert store.rows(name, 1) == file.get_tensor(name)[:1].float().tolist()
    with pytest.raises(ValueError, match=r"no tensor 'model\.visual"):
        store.load_weights([("model.visual.merger.mlp.0.weight", torch.zeros(1))])


def test_padding_moves_no_position(seen: tuple[PreTrainedModel, LanguageModel], tmp_path: Path) -> None:
    model, engine = seen
    picture = write_picture(tmp_path, 3, 1, 4)
    ids, spans = expand([[1, 2], picture])
    entries = PlacedImages(store=ImageStore(folder=tmp_path, vision=vision_of(model)), spans=spans).entries(as_data=False)
    [image] = parse(engine.info, input_ids=ids, image_data=entries)
    [text] = parse(engine.info, input_ids=[*range(20)])
    sight = engine._sight
    assert isinstance(sight, Sight)
    found = sight.positions([image.shown(), text.shown()], 20)
    assert found.shape == (3, 2, 20)
    np.testing.assert_array_equal(found[:, 1], [range(20)] * 3)
    np.testing.assert_array_equal(found[:, 0, -len(ids) :], sight.positions([image.shown()], len(ids))[:, 0])
