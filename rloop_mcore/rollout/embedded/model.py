"""The model behind the engine: loading, and the three forwards that generation needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rloop_mcore.errors import UserError
from rloop_mcore.rollout.embedded import attention

_PREFILL_TOKENS = 8192  # padded tokens of one forward
_SHARED_PREFIX = 16  # a common prefix shorter than this is not worth a forward of its own


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
        self.eos = _end_tokens(path, self.config.eos_token_id)
        self.tokenizer = _tokenizer(path)

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, context: object) -> torch.Tensor:
        return self.network.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, key_values=context
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.get_output_embeddings()(hidden)

    def start(self, prompts: Sequence[Sequence[int]], owner: np.ndarray) -> tuple[torch.Tensor, attention.Decode, int]:
        """Read distinct prompts; row r of the batch continues `prompts[owner[r]]`.

        Returns the logits of each row's first token [rows, vocabulary], the context to decode in, and the length of
        the prefix that all prompts share and that was read once.
        """
        shared: list[attention.SharedSegment] = []
        common = _common_prefix(prompts) if len(prompts) > 1 else 0
        if common < _SHARED_PREFIX:
            common = 0
        prefix = None
        if common:
            prefix, _ = self._read([prompts[0][:common]], np.zeros(len(owner), dtype=np.int64), None, 0)
            shared.append(prefix)
        tails, last = self._read([p[common:] for p in prompts], owner, prefix, common)
        shared.append(tails)
        logits = self._logits(last)
        return logits[torch.from_numpy(owner).to(self.device)], attention.Decode(shared, self.layers), common

    def _read(
        self, prompts: Sequence[Sequence[int]], owner: np.ndarray, prefix: attention.SharedSegment | None, offset: int
    ) -> tuple[attention.SharedSegment, torch.Tensor]:
        """Forward over right-padded prompts; returns their keys and values, and the last hidden states [prompts, d].

        Padding on the right needs no mask here: causal attention never looks at it.
        """
        lengths = np.array([len(p) for p in prompts])
        longest = int(lengths.max())
        rows = max(1, _PREFILL_TOKENS // longest)
        positions = torch.arange(offset, offset + longest, device=self.device)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        last = []
        for begin in range(0, len(prompts), rows):
            part = prompts[begin : begin + rows]
            padded = np.zeros((len(part), longest), dtype=np.int64)
            for row, prompt in enumerate(part):
                padded[row, : len(prompt)] = prompt
            context = attention.Prefill(prefix)
            hidden = self._hidden(torch.from_numpy(padded).to(self.device), positions.expand(len(part), -1), context)
            ends = torch.from_numpy(lengths[begin : begin + rows] - 1).to(self.device)
            last.append(hidden[torch.arange(len(part), device=self.device), ends])
            if not keys:
                keys = [k.new_empty(len(prompts), *k.shape[1:]) for k in context.keys]
                values = [v.new_empty(len(prompts), *v.shape[1:]) for v in context.values]
            for layer in range(self.layers):
                keys[layer][begin : begin + rows] = context.keys[layer]
                values[layer][begin : begin + rows] = context.values[layer]
        return attention.SharedSegment(keys, values, lengths, owner), torch.cat(last)

    def step(self, ids: torch.Tensor, positions: torch.Tensor, context: attention.Decode) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token a row; ids and positions [rows]."""
        hidden = self._hidden(ids[:, None], positions[:, None], context)
        context.own.length += 1
        return self._logits(hidden[:, 0])

    def prompt_logprobs(self, prompt: Sequence[int], start: int) -> list[float]:
        """log_softmax (temperature 1, fp32) of prompt tokens `start` + 1 .. end, given what stands before each."""
        ids = torch.tensor([prompt], device=self.device)
        hidden = self._hidden(ids, torch.arange(len(prompt), device=self.device)[None], None)[0, start:-1]
        logprobs = self._logits(hidden).float().log_softmax(-1)
        return logprobs.gather(1, ids[0, start + 1 :, None])[:, 0].tolist()


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at least one being left of each."""
    shortest = min(len(p) for p in prompts) - 1
    table = np.array([p[:shortest] for p in prompts])
    differs = (table != table[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def _end_tokens(path: Path, from_config: int | list[int] | None) -> tuple[int, ...]:
    ids = from_config
    if (path / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(path).eos_token_id or ids
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None: token ids in and out need none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(path)
