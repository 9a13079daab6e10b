"""A chat template that knows tools, as Qwen's and its kin's do, and a tokeniser for it; shared by the tests of tools."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = """
{%- set ns = namespace(last_user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<|im_start|>system
Functions you may call, as {"name": ..., "arguments": ...} between <tool_call> and </tool_call>:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif m.role == 'assistant' %}<|im_start|>assistant
{% if loop.index0 > ns.last_user %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}
{%- for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a byte, a few merges, and the marks; the tags of calls are tokens that are not special, as in Qwen's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "d"), ("ad", "d"), ("4", "2")]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *(first + second for first, second in merges)])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(tag) for tag in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    tokenizer.chat_template = template
    return tokenizer


PIECES = ["<pad>", "<|im_end|>", "<|im_start|>", "<unk>", *"abcdefgh", "system", "user", "assistant", "1", "2", "3"]
CALLS = [
    *(f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": 2}}}}</tool_call>' for a in range(1, 6)),
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"name": "guess", "arguments": {"letter": "a"}}</tool_call>',
    "<tool_call>{broken</tool_call>",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole calls are single tokens, so that a model with random weights makes some."""
    core = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate([*PIECES, *CALLS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
