"""A tokenizer that takes any text: a token a byte, special tokens besides."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<end>")


def bytewise(template: str | None = None, *, opens: bool = False, closes: bool = False) -> PreTrainedTokenizerFast:
    """``opens``, ``closes``: its post-processor puts <s> before a text, </s> after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    form = ["<s>"] * opens + ["$A"] + ["</s>"] * closes
    named = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=" ".join(form), pair="$A $B", special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)
