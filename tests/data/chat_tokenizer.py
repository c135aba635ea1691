"""A tokenizer of bytes with chat tokens, as a folder that transformers opens."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rloop_mcore.data.tokenizer import TextTokenizer

SPECIAL = ["<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def write_chat_tokenizer(folder: Path, template: object = CHATML, eos: object = None) -> TextTokenizer:
    """template: the jinja file's text, or what tokenizer_config.json says; eos: of generation_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: n for n, text in enumerate(SPECIAL + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"__type": "AddedToken", "content": "<|bos|>"}}
    config |= {"eos_token": "<|endoftext|>", "pad_token": None}
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
        template = "not this one"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return TextTokenizer(folder)
