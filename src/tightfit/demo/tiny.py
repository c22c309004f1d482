"""A tiny Llama with invented weights, for a machine with no network and no torch.

It has everything that a checkpoint has: grouped KV heads, a byte-level tokenizer, a chat template.
Its weights are random, so what it generates is nonsense; whoever shows that text has to say so.
"""

import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path

from tightfit.demo.hf import Bf16Tensor, byte_level_tokenizer, tokenizer_config, write_checkpoint

SEED = 20250101

# Shapes that show something: an odd vocabulary, which engines pad; heads and blocks of 128 that
# divide by two ranks; a head_dim that vLLM's CPU attention accepts.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 8, 2, 32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 2048
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_checkpoint(directory: Path) -> Path:
    """Write the tiny model (2.4 million parameters, 4.7 MB in bfloat16) to `directory`.

    The same version writes the same bytes on every machine.

    Raises:
        OutputError: the directory is not empty, or cannot be written.
    """
    tokens = [*SPECIAL, *_byte_letters()]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    write_checkpoint(
        directory,
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            **ids,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "initializer_range": 0.02,
            "intermediate_size": INTERMEDIATE,
            "max_position_embeddings": CONTEXT,
            "mlp_bias": False,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": len(tokens),
        },
        generation_config=ids,
        tokenizer=byte_level_tokenizer(tokens, [], special=range(len(SPECIAL))),
        tokenizer_config=tokenizer_config(
            tokens, bos=1, eos=2, pad=2, max_length=CONTEXT, chat_template=_CHAT_TEMPLATE
        ),
        tensors=list(_tensors(len(tokens))),
        source=f"random weights of tightfit demo, seed {SEED}",
    )
    return directory


def _tensors(vocab: int) -> Iterator[Bf16Tensor]:
    def matrix(name: str, rows: int, columns: int) -> Bf16Tensor:
        shape = (rows, columns)
        return Bf16Tensor(name=f"{name}.weight", shape=shape, blocks=_noise(name, shape))

    def norm(name: str) -> Bf16Tensor:
        ones = b"\x80\x3f" * HIDDEN
        return Bf16Tensor(name=f"{name}.weight", shape=(HIDDEN,), blocks=lambda: [ones])

    yield matrix("model.embed_tokens", vocab, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield norm(prefix + "input_layernorm")
        yield matrix(prefix + "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN)
        yield matrix(prefix + "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        yield matrix(prefix + "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        yield matrix(prefix + "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        yield norm(prefix + "post_attention_layernorm")
        yield matrix(prefix + "mlp.gate_proj", INTERMEDIATE, HIDDEN)
        yield matrix(prefix + "mlp.up_proj", INTERMEDIATE, HIDDEN)
        yield matrix(prefix + "mlp.down_proj", HIDDEN, INTERMEDIATE)
    yield norm("model.norm")
    yield matrix("lm_head", vocab, HIDDEN)


def _noise(name: str, shape: tuple[int, ...]) -> Callable[[], Iterator[bytes]]:
    return partial(_random_blocks, f"{SEED} {name}", shape)


def _random_blocks(seed: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Uniform numbers: unlike normal ones they need no libm, which differs between machines."""
    draw = random.Random(seed).random
    count = prod(shape)
    packed = struct.pack(f"<{count}f", *[(draw() - 0.5) * 0.25 for _ in range(count)])
    # The upper half of a float32 is the bfloat16 next to it in the direction of zero.
    block = bytearray(2 * count)
    block[0::2], block[1::2] = packed[2::4], packed[3::4]
    yield bytes(block)


def _byte_letters() -> list[str]:
    """The printable letter for each byte: `bytes_to_unicode` of GPT-2's encoder.py."""
    others = iter(range(256, 512))
    return [
        chr(byte if chr(byte).isprintable() and byte != 0x20 else next(others))
        for byte in range(256)
    ]
