"""Text to ids and back, at the price of the tokenizer's backend where its own methods add nothing.

A Hugging Face tokenizer's `encode` spends twice as long on its arguments as its backend does on a
short text, and its `decode` looks at every id. A rollout calls them in every turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec:
    """`encode` and `decode` of one tokenizer; nothing is added, and special tokens are kept.

    Example::

        codec.encode("Ulm<|im_end|>")     [85, 76, 77, 2]
        codec.decode([85, 76, 77, 2])     "Ulm<|im_end|>"
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._encoder = self._decoder = None
        if _is_plain(tokenizer, "encode", "_encode_plus") and not tokenizer.split_special_tokens:
            self._encoder = self._tokenizer.backend_tokenizer
        if _is_plain(tokenizer, "decode", "_decode") and not self._cleans_up():
            self._decoder = self._tokenizer.backend_tokenizer

    def encode(self, text: str) -> list[int]:
        backend = self._encoder
        # the backend remembers what its last caller wanted
        if backend is None or backend.padding or backend.truncation:
            return self._tokenizer.encode(text, add_special_tokens=False)
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        decoder = self._decoder or self._tokenizer
        return decoder.decode(ids, skip_special_tokens=False)

    def _cleans_up(self) -> bool:
        return bool(self._tokenizer.clean_up_tokenization_spaces)


def _is_plain(tokenizer: object, *methods: str) -> bool:
    """Whether these methods are those of transformers' own classes around a backend."""
    kinds = type(tokenizer).__mro__
    owners = {next(c.__name__ for c in kinds if name in vars(c)) for name in methods}
    return owners == {"PreTrainedTokenizerBase", "TokenizersBackend"}
