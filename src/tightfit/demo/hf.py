"""The files of a Hugging Face checkpoint with a byte-level BPE tokenizer, written from data.

Keys have their older spellings (`torch_dtype`, `rope_theta`), which every transformers from 4.48 on
and every vLLM reads.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tightfit.checkpoint.header import encode_header
from tightfit.demo.output import OutputDirectory

WEIGHTS = "model.safetensors"
FILES = (
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16Tensor:
    """A tensor to write: `blocks` gives its little-endian bfloat16 bytes in row order."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes]]


def write_checkpoint(
    directory: Path,
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tensors: Sequence[Bf16Tensor],
    source: str,
) -> None:
    """Write a checkpoint with one weights file, holding one block of a tensor at a time.

    Args:
        directory: a new or an empty directory.
        source: where the weights come from, for the file's metadata.

    Raises:
        OutputError: the directory is not empty, or cannot be written.
    """
    entries = [(t.name, "BF16", t.shape, 2 * prod(t.shape)) for t in tensors]
    header = encode_header(entries, metadata={"format": "pt", "source": source})
    with OutputDirectory(directory) as out:
        part = out.create(WEIGHTS, len(header) + sum(nbytes for *_, nbytes in entries))
        with open(part.fd, "wb", closefd=False) as file:
            file.write(header)
            for tensor in tensors:
                file.writelines(tensor.blocks())
            assert file.tell() == part.nbytes, "blocks do not add up to the shapes"
        texts = (tokenizer, tokenizer_config, generation_config, config)
        for name, values in zip(FILES[1:], texts, strict=True):
            indent = None if name == "tokenizer.json" else 2
            out.write_text(name, json.dumps(values, ensure_ascii=False, indent=indent) + "\n")
        out.commit()


def byte_level_tokenizer(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    special: Iterable[int],
    individual_digits: bool = False,
) -> dict[str, Any]:
    """A `tokenizer.json` of GPT-2's kind: BPE over bytes that are written as letters.

    Args:
        tokens: all tokens in the order of their ids.
        merges: pairs "a b", the first to be merged first.
        special: ids of the tokens that text is searched for before anything else.
        individual_digits: whether every digit is a word of its own.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    pretokenizers: list[dict[str, Any]] = [byte_level]
    if individual_digits:
        pretokenizers.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": list(merges),
        },
    }


def tokenizer_config(
    tokens: Sequence[str], *, bos: int, eos: int, pad: int, max_length: int, chat_template: str
) -> dict[str, Any]:
    """A `tokenizer_config.json` that leaves everything to the `tokenizer.json` beside it."""
    return {
        # GPT2Tokenizer would be the historical name, but transformers 5 then builds its own
        # pre-tokenizer, and digits are no longer split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "unk_token": tokens[0],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
