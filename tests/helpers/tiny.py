"""A tiny random Llama with a tokenizer of its own: loads in no time, and its tokens still tell."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

POSITIONS = 512
EOS = 257
NEW = 12  # tokens to generate in the job that is the same everywhere
LONG = (
    "This prompt is longer than what one rank of the job can hold, so that it has to span several "
    "of them, and the answer must be what a single process with room for all of it would say."
)
PROMPTS = ("Hello", LONG, [40, 41, 42])
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tiny_model(folder: Path, positions: int = POSITIONS) -> Path:
    """Write config, fp32 safetensors and tokenizer into ``folder``."""
    tokenizer = _tokenizer()
    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,  # the default's logits are so level that rounding would decide
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and two special ones; every text is spelled back exactly."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def greedy_tokens(folder: Path) -> list[list[int]]:
    """What transformers alone answers to ``PROMPTS``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        tokens.append(whole[0, len(ids) :].tolist())
    return tokens


def write_prompts(file: Path) -> str:
    """``PROMPTS`` as JSON lines."""
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return str(file)
