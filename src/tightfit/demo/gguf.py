"""A Llama in llama.cpp's GGUF format as a Hugging Face checkpoint, a few megabytes at a time.

transformers can read GGUF too, but it holds all weights several times over, takes half a minute,
and forgets that this tokenizer splits digits. The 4-bit values are de-quantized to bfloat16, so the
result has the shapes and the behaviour of the original checkpoint, not its exact numbers.

Formats: GGUF, ggml/docs/gguf.md; tensor names and the order of rotary rows,
`LlamaModel` in llama.cpp/convert_hf_to_gguf.py (`permute`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.demo.hf import Bf16Tensor, byte_level_tokenizer, tokenizer_config, write_checkpoint
from tightfit.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""`TokenType.CONTROL`: text such as <|im_end|> that only this one token stands for."""

_BLOCK_ROWS = 4096


def convert_llama(gguf_file: Path, directory: Path, *, source: str) -> None:
    """Write the checkpoint of a Llama with GPT-2's kind of tokenizer.

    Args:
        gguf_file: a file whose content is known: it is trusted to be well-formed.
        directory: a new or an empty directory.
        source: where the weights come from, for the file's metadata.

    Raises:
        MissingExtraError: the packages `gguf` or `numpy` are not installed.
        OutputError: the directory cannot be written.
    """
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise MissingExtraError("demo", "demo", e.name or "gguf") from e
    reader = GGUFReader(gguf_file)
    field = _Fields(reader)
    tokens = field.texts("tokenizer.ggml.tokens")
    types = field.numbers("tokenizer.ggml.token_type")
    assert field.text("general.architecture") == "llama"
    assert field.text("tokenizer.ggml.pre") == "smollm"
    heads = field.integer("llama.attention.head_count")
    head_dim = field.integer("llama.embedding_length") // heads
    bos, eos, pad = (
        field.integer(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "padding")
    )
    context = field.integer("llama.context_length")
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    names = {tensor.name for tensor in reader.tensors}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ids,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": field.integer("llama.embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": field.integer("llama.feed_forward_length"),
        "max_position_embeddings": context,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": field.integer("llama.block_count"),
        "num_key_value_heads": field.integer("llama.attention.head_count_kv"),
        "rms_norm_eps": field.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": field.decimal("llama.rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(tokens),
    }
    write_checkpoint(
        directory,
        config=config,
        generation_config=ids,
        tokenizer=byte_level_tokenizer(
            tokens,
            field.texts("tokenizer.ggml.merges"),
            special=[i for i, kind in enumerate(types) if kind == _CONTROL],
            # The name "smollm" of the pre-tokenizer means this (llama.cpp/src/llama-vocab.cpp).
            individual_digits=True,
        ),
        tokenizer_config=tokenizer_config(
            tokens,
            bos=bos,
            eos=eos,
            pad=pad,
            max_length=context,
            chat_template=field.text("tokenizer.chat_template"),
        ),
        tensors=[
            Bf16Tensor(
                name=_name(tensor.name),
                # GGUF lists dimensions from the innermost.
                shape=tuple(int(n) for n in reversed(tensor.shape)),
                blocks=_blocks(tensor, head_dim),
            )
            for tensor in reader.tensors
        ],
        source=source,
    )


class _Fields:
    """The metadata of a GGUF file, for any version of the `gguf` package."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def texts(self, key: str) -> list[str]:
        field = self._fields[key]
        return [field.parts[i].tobytes().decode() for i in field.data]

    def text(self, key: str) -> str:
        return self.texts(key)[0]

    def numbers(self, key: str) -> list[int]:
        field = self._fields[key]
        return [int(field.parts[i][0]) for i in field.data]

    def integer(self, key: str) -> int:
        return self.numbers(key)[0]

    def decimal(self, key: str) -> float:
        """A float32 as the decimal number that it was made from: 1e-05, not 9.99999974738e-06."""
        field = self._fields[key]
        return float(f"{float(field.parts[field.data[0]][0]):.6g}")


def _name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, module, kind]:
            return f"model.layers.{layer}.{_NAMES[module]}.{kind}"
        case [module, kind]:
            return f"{_NAMES[module]}.{kind}"
    raise AssertionError(f"unknown tensor {name}")


def _blocks(tensor: Any, head_dim: int) -> Callable[[], Iterator[bytes]]:
    rotary = tensor.name.endswith((".attn_q.weight", ".attn_k.weight"))
    return partial(_dequantized, tensor, head_dim if rotary else None)


def _dequantized(tensor: Any, head_dim: int | None) -> Iterator[bytes]:
    import numpy as np
    from gguf.quants import dequantize

    data = tensor.data
    step = _BLOCK_ROWS if data.ndim > 1 else len(data)
    for first in range(0, len(data), step):
        rows: NDArray[np.float32] = dequantize(data[first : first + step], tensor.tensor_type)
        if head_dim is not None:
            # llama.cpp rotates neighbouring rows of a head, Hugging Face the row and the one
            # half a head further on.
            columns = rows.shape[-1]
            rows = rows.reshape(-1, head_dim // 2, 2, columns).swapaxes(1, 2)
        yield to_bfloat16(np.ascontiguousarray(rows)).tobytes()


def to_bfloat16(values: "NDArray[np.float32]") -> "NDArray[np.uint16]":
    """Round float32 to the bits of bfloat16, to nearest and ties to even; no NaN is expected."""
    bits = values.view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded
