"""The model behind the engine: loading, and the forwards that generation needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rloop_mcore.errors import UserError
from rloop_mcore.rollout.embedded import attention

_PREFILL_TOKENS = 8192  # padded tokens of one forward


class CausalModel:
    """A transformers causal language model whose attention is ours (`attention.py`)."""

    def __init__(self, path: Path, dtype: torch.dtype, device: str) -> None:
        """Load the HF folder `path`; raises UserError when it is not one this engine can serve."""
        self.path, self.device = path, torch.device(device)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention.NAME, use_safetensors=True, trust_remote_code=False
        )
        self.network = model.to(self.device).eval().requires_grad_(False)
        self.config = model.config
        if "sliding_attention" in (getattr(self.config, "layer_types", None) or ()):
            raise UserError(f"model {path} uses sliding-window attention, which the embedded engine does not implement")
        self.layers: int = self.config.num_hidden_layers
        self.vocabulary: int = self.config.vocab_size
        self.tokenizer = _tokenizer(path)
        self.eos = _end_tokens(path, self.config.eos_token_id, self.tokenizer)

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, context: object) -> torch.Tensor:
        return self.network.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, key_values=context
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.get_output_embeddings()(hidden)

    def read(self, heads: Sequence[Sequence[int]], prefix: attention.Entries | None) -> attention.Entries:
        """Keys and values of token sequences, which may be empty and follow `prefix` (one entry) where it is given."""
        lengths = np.array([len(h) for h in heads])
        longest = max(1, int(lengths.max()))
        offset = 0 if prefix is None else int(prefix.lengths[0])
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for part in _parts(lengths):
            # Padding on the right needs no mask here: causal attention never looks at it.
            padded = np.zeros((len(part), max(1, int(lengths[part].max()))), dtype=np.int64)
            for row, head in enumerate(part):
                padded[row, : lengths[head]] = heads[head]
            context = attention.Prefill(prefix)
            positions = torch.arange(offset, offset + padded.shape[1], device=self.device)
            self._hidden(torch.from_numpy(padded).to(self.device), positions.expand(len(part), -1), context)
            if not keys:
                keys = [k.new_zeros(len(heads), k.shape[1], longest, k.shape[3]) for k in context.keys]
                values = [v.new_zeros(k.shape) for k, v in zip(keys, context.values, strict=True)]
            index = torch.from_numpy(part).to(self.device)
            for layer in range(self.layers):
                keys[layer][index, :, : padded.shape[1]] = context.keys[layer]
                values[layer][index, :, : padded.shape[1]] = context.values[layer]
        return attention.Entries(keys, values, lengths)

    def step(self, ids: torch.Tensor, positions: torch.Tensor, context: attention.Decode) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token a row; ids and positions [rows]."""
        hidden = self._hidden(ids[:, None], positions[:, None], context)
        context.own.next_column()
        return self._logits(hidden[:, 0])

    def prompt_logprobs(self, prompt: Sequence[int], start: int) -> list[float]:
        """log_softmax (temperature 1, fp32) of prompt tokens `start` + 1 .. end, given what stands before each."""
        ids = torch.tensor([prompt], device=self.device)
        hidden = self._hidden(ids, torch.arange(len(prompt), device=self.device)[None], None)[0, start:-1]
        logprobs = self._logits(hidden).float().log_softmax(-1)
        return logprobs.gather(1, ids[0, start + 1 :, None])[:, 0].tolist()


def _parts(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of sequences to be read in one forward: shortest first, padded to at most _PREFILL_TOKENS in all."""
    order = np.argsort(lengths, kind="stable")
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - begin) * lengths[order[end]] > _PREFILL_TOKENS:
            yield order[begin:end]
            begin = end


def _end_tokens(
    path: Path, from_config: int | list[int] | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Those of config.json, of generation_config.json and of the tokenizer, as in SGLang."""
    stated = [from_config]
    if (path / "generation_config.json").is_file():
        stated.append(GenerationConfig.from_pretrained(path).eos_token_id)
    if tokenizer is not None:
        stated.append(tokenizer.eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in stated if ids is not None]
    return tuple(dict.fromkeys(chain.from_iterable(lists)))


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None: token ids in and out need none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(path)
