"""A real engine process over tiny random models, and the transformers models to compare it with."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

REPO = Path(__file__).resolve().parents[3]
EOS = 7


@dataclass
class Server:
    """An engine process and how to talk to it."""

    process: subprocess.Popen[str]
    port: int
    log: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: object, status: int = 200) -> object:
        response = httpx.post(self.url + path, json=body, timeout=60, trust_env=False)
        assert response.status_code == status, response.text
        return response.json() if response.text else None

    def get(self, path: str, status: int = 200) -> object:
        response = httpx.get(self.url + path, timeout=60, trust_env=False)
        assert response.status_code == status, response.text
        return response.json() if response.text else None


def start_server(folder: Path, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Server:
    command = [sys.executable, "-m", "rlx.cli.serve", "--model", str(folder), "--threads", "1", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=REPO, stdout=pipe, stderr=pipe, text=True, pass_fds=pass_fds)
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    threading.Thread(target=log.extend, args=(process.stderr,), daemon=True).start()
    line = process.stdout.readline()
    assert line.startswith("rlx-serve ready port="), (line, log)
    return Server(process, int(line.removeprefix("rlx-serve ready port=")), log)


def make_qwen2(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=131,
        hidden_size=45,  # odd: in a byte buffer of mixed types most tensors start where their type is not aligned
        intermediate_size=87,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=160,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():  # fresh biases are zero and norms one, which would hide a mistake in either
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def random_prompts(model: PreTrainedModel, lengths: list[int]) -> list[list[int]]:
    return [[random.randrange(8, model.config.vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """Teacher-forced log-probs of tokens 1..L-1, one sequence at a time, no cache."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
