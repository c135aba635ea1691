"""A tiny random Qwen2 with a character tokenizer, embedded servers over it, and a bare HTTP client."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from rloop_mcore.rollout.launch import EmbeddedServer

CHARACTERS = "0123456789+-*=, QA:\nabcdefghijklmnopqrstuvw"
VOCABULARY = 2 + len(CHARACTERS)  # <pad>, <eos>, then the characters
EOS = 1
START_S = 120.0


def make_model(folder: Path, seed: int) -> Path:
    """Save a random Qwen2 (GQA 4/2, 2 layers) whose logits are spread enough for sampling to matter."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": EOS} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def token_logprobs(reference: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log_softmax(logits / temperature) of ids[1:], by one plain forward of transformers."""
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@dataclass
class Endpoint:
    url: str
    key: str | None

    def request(self, path: str, body: Any = None, key: str | None = None, raw: bytes | None = None) -> tuple[int, Any]:
        """(status, parsed JSON or text). A body makes it a POST; `key` overrides the endpoint's."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def generate(self, input_ids: Any, return_logprob: bool = True, **sampling: Any) -> Any:
        """The answer to a /generate call that must succeed; sampling fields as keywords."""
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": return_logprob}
        status, answer = self.request("/generate", body)
        assert status == 200, answer
        return answer


def start_server(model_path: Path, run_dir: Path, name: str, max_running: int = 64) -> EmbeddedServer:
    return EmbeddedServer(model_path, run_dir, name, max_running=max_running, threads=1, dtype="float32", device="cpu")


def endpoint_of(server: EmbeddedServer) -> Endpoint:
    return Endpoint(*asyncio.run(server.ready(START_S)))
