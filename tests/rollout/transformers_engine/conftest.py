from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.rollout.transformers_engine.tiny import VOCABULARY, build


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens 3 and up spell ``a``, ``b``, ... and some pairs of them."""
    letters = [chr(ord("a") + number) for number in range(26)]
    pieces = ["<pad>", "<s>", "</s>", *letters, *map("".join, pairwise(letters))][:VOCABULARY]
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")
