"""The built-in model: a small Qwen3 with a byte-level tokenizer.

It needs no download, trains on two CPU cores in minutes, and is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(
    folder: Path,
    corpus: Iterable[str],
    *,
    seed: int,
    cut: str | None = None,
    vocab_size: int = 520,
    **sizes: int,
) -> Path:
    """Train a tokenizer on `corpus`, draw random weights, and write both to `folder`.

    Args:
        cut: regular expression; no token crosses the borders of its matches.
        vocab_size: large enough for merges of syllables, too small for merges of whole names. A
            token that occurs in one name only is rarely copied, so copying it is not learned.
        sizes: layers, width and max_context of `tiny_architecture`.

    config.json is written last, so a folder that has it is complete.
    """
    transformers_logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = _tokenizer(corpus, vocab_size, cut)
    tokenizer.save_pretrained(partial)
    ids = tokenizer.get_vocab()
    torch.manual_seed(seed)
    config = tiny_architecture(
        vocab_size=vocab_size, eos_token_id=ids[END], pad_token_id=ids[PAD], **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(partial)
    folder.mkdir(exist_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    partial.rmdir()
    return folder


def tiny_architecture(
    *,
    vocab_size: int = 520,
    layers: int = 4,
    width: int = 128,
    max_context: int = 1024,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Qwen3Config:
    """The transformers config of the built-in model."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=max_context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        dtype="float32",
    )


def _tokenizer(corpus: Iterable[str], vocab_size: int, cut: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(cut), "isolated")] if cut else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, words]) if splits else words
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
