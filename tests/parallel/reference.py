"""The toy policy in transformers: an independent implementation to compare with."""

from __future__ import annotations

import torch
from toy_data import FFN, GROUPS, HEAD, HEADS, HIDDEN, LAYERS, VOCABULARY, examples
from transformers import Qwen2Config, Qwen2ForCausalLM


def megatron_to_hf(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under Qwen2's names; Megatron keeps q, k, v of each group together."""
    hf = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "lm_head.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    for layer in range(LAYERS):
        source, target = f"decoder.layers.{layer}", f"model.layers.{layer}"
        for kind in ("weight", "bias"):
            fused = weights[f"{source}.self_attention.linear_qkv.{kind}"]
            grouped = fused.view(GROUPS, HEADS // GROUPS + 2, HEAD, *fused.shape[1:])
            for name, part in (("q", grouped[:, :-2]), ("k", grouped[:, -2:-1]), ("v", grouped[:, -1:])):
                hf[f"{target}.self_attn.{name}_proj.{kind}"] = part.reshape(-1, *fused.shape[1:])
        gate, up = weights[f"{source}.mlp.linear_fc1.weight"].chunk(2)
        hf |= {
            f"{target}.self_attn.o_proj.weight": weights[f"{source}.self_attention.linear_proj.weight"],
            f"{target}.mlp.gate_proj.weight": gate,
            f"{target}.mlp.up_proj.weight": up,
            f"{target}.mlp.down_proj.weight": weights[f"{source}.mlp.linear_fc2.weight"],
            f"{target}.input_layernorm.weight": weights[f"{source}.input_layernorm.weight"],
            f"{target}.post_attention_layernorm.weight": weights[f"{source}.pre_mlp_layernorm.weight"],
        }
    return hf


def fine_tuning_gradient(
    weights: dict[str, torch.Tensor], rows: int, seed: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Token-mean NLL of the responses of `examples(rows, seed)`, row by row, unpadded; its gradient by HF name."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=FFN,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(megatron_to_hf(weights))
    batch = examples(rows, seed)
    total = torch.zeros(())
    for row in batch:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(len(row.prompt_ids), ids.size(1)):
            total = total - logprobs[position - 1, ids[0, position]]
    loss = total / sum(len(row.response_ids) for row in batch)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}
