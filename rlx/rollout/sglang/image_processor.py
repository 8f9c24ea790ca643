"""SGLang's processor of images for requests of rlx: the token ids that come are the ones used, and pixels are not resized.

A module of the package ``rlx_images`` that servers find by ``SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE``. SGLang's own processor would
decode ids and tokenise the text again, and answers HTTP 200 to some requests that it got wrong. Requests in another form
than ``image_request``'s still go there.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from torch import Tensor, tensor

# In the server this file and the next one are a package of their own.
from .image_request import Grid, ImageEntry, Patches, content, is_ours, pixels, positions, read_entries

_KEPT_BYTES = 2**29  # pixels of images that are asked about again, as those of a group are


class ImagesByIds(QwenVLImageProcessor):  # type: ignore[misc]
    """Takes the place of SGLang's for these models."""

    models = (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patches = Patches.of(vars(self._processor.image_processor))
        self._kept: OrderedDict[tuple[str, Grid], Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *arguments: Any, **named: Any
    ) -> Any:
        if not is_ours(image_data):
            return await super().process_mm_data_async(image_data, input_text, request_obj, *arguments, **named)
        if not isinstance(input_text, list):
            raise ValueError("rlx_images: wanted input_ids beside image_data, not a text")
        entries = read_entries(image_data, input_text, self.IM_TOKEN_ID, self._patches.merge)
        loop = asyncio.get_running_loop()
        found = [loop.run_in_executor(self.io_executor, self._pixels, entry) for entry in entries]
        return self._output(input_text, entries, await asyncio.gather(*found))

    def _pixels(self, entry: ImageEntry) -> Tensor:
        """An image's patches; in a thread of SGLang's pool, so that the server goes on answering."""
        name = (entry.key, entry.grid)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        found = pixels(content(entry), entry, self._patches)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = found
                self._kept_bytes += found.nbytes
            while self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _output(self, input_ids: list[int], entries: Sequence[ImageEntry], found: Sequence[Tensor]) -> Any:
        items = [self._item(entry, pixels) for entry, pixels in zip(entries, found, strict=True)]
        placed = positions(len(input_ids), [(entry.start, entry.grid) for entry in entries], self._patches.merge)
        return MultimodalProcessorOutput(
            input_ids=input_ids,
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(input_ids, items),
            mm_items=items,
            im_start_id=self.vision_start_token_id,
            im_end_id=self.vision_end_token_id,
            im_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
            mrope_positions=placed,
            mrope_position_delta=tensor([[int(placed.max()) + 1 - len(input_ids)]]),
        )

    def _item(self, entry: ImageEntry, pixels: Tensor) -> Any:
        item = MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=pixels,
            offsets=[(entry.start, entry.end - 1)],
            model_specific_data={"image_grid_thw": tensor([entry.grid])},
        )
        # What the prefix cache and the cache of embeddings know the image by.
        identity = bytes.fromhex(entry.key)
        if hasattr(item, "set_identity"):
            item.set_identity(identity)
        else:
            item.hash = int.from_bytes(identity[:8], "big")
            item.set_pad_value()
        return item
