"""The CPU backend is there for who asks for it, and leaves the rest of the process as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
from rlx.processes.device import take_device
take_device("cpu", 0)
import rlx.parallel.context
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
built = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
built.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for name, buffer in built.named_buffers():
    assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name
with torch.device("meta"):
    made = [torch.tensor([1.0]), torch.ones(2), torch.empty(2), torch.arange(3)]
assert all(tensor.is_meta for tensor in made)
"""


def test_transformers_loads_models_in_the_same_process(tmp_path: Path) -> None:
    """It builds them on the meta device first; what is not in the file (rotary frequencies) would be whatever memory held."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
