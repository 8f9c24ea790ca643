"""An engine against transformers on a folder, in a process of its own: reads where from stdin, prints the differences."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from rlx.rollout.keys import EngineKeys
from rlx.rollout.sglang.control import EngineControl
from tests.sglang.models import VOCAB, greedy, scores, sequences

COUNT = 24


def main() -> None:
    torch.set_num_threads(1)
    where = json.load(sys.stdin)
    keys = EngineKeys(api_key=where["api_key"], admin_key=where["admin_key"])
    control = EngineControl(where["url"], timeout_s=120, keys=keys)
    model = AutoModelForCausalLM.from_pretrained(where["folder"], dtype=torch.float32).eval()
    rows = [*sequences(11, [2, 42, 90]), [VOCAB - 1, 0, VOCAB - 1]]
    worst = max(abs(a - b) for row in rows for a, b in zip(control.score(row), scores(model, row), strict=True))
    wrong, logprobs = 0, 0.0
    for row in sequences(12, [1, 17, 42]):
        want, _ = greedy(model, row, COUNT)
        sampling = {"max_new_tokens": COUNT, "temperature": 0.0}
        answer = control._json("POST", "/generate", {"input_ids": row, "sampling_params": sampling, "return_logprob": True})
        got = answer["output_ids"]
        wrong += got != want
        theirs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        logprobs = max(logprobs, *(abs(a - b) for a, b in zip(theirs, scores(model, row + got)[-COUNT:], strict=True)))
    version = int(control.weight_version())
    print(json.dumps({"scores": worst, "greedy_tokens": wrong, "greedy_logprobs": logprobs, "version": version}))


if __name__ == "__main__":
    main()
