import json
from pathlib import Path
from typing import Any

import pytest

from tightfit.demo.gguf import convert_llama, to_bfloat16

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4, 2, 32, 160, 5000
HIDDEN = HEADS * HEAD_DIM


def as_llama_cpp(weights: Any, heads: int) -> Any:
    """The order of rows that convert_hf_to_gguf.py gives to a rotary projection."""
    rows, columns = weights.shape
    return (
        weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    return {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (MLP, HIDDEN),
        "blk.0.ffn_up.weight": (MLP, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, MLP),
        **({} if tied else {"output.weight": (VOCAB, HIDDEN)}),
    }


def write_gguf(path: Path, tied: bool) -> dict[str, Any]:
    """Write random weights in the three types of the demo model; give their values by GGUF name."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<pad>", "<bos>", "<eos>", *(f"t{i}" for i in range(VOCAB - 3))])
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    values = {}
    for name, shape in shapes(tied).items():
        data = rng.standard_normal(shape).astype(np.float32)
        kind = "F32" if len(shape) == 1 else "Q8_0" if name.startswith("token") else "Q4_1"
        qtype = gguf.GGMLQuantizationType[kind]
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stored = gguf.quants.quantize(as_llama_cpp(data, heads) if heads else data, qtype)
        values[name] = gguf.quants.dequantize(gguf.quants.quantize(data, qtype), qtype)
        writer.add_tensor(name, stored, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("tied", [True, False])
def test_every_value_and_every_name(tmp_path: Path, tied: bool) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    values = write_gguf(tmp_path / "model.gguf", tied)
    convert_llama(tmp_path / "model.gguf", tmp_path / "out", source="a test")
    # Rotary rows are dealt per head: a permutation must not show in what transformers loads.
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert len(loaded) == len(values)
    attention = loaded["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(attention, torch.from_numpy(values["blk.0.attn_k.weight"]).bfloat16())
    embeddings = loaded["model.embed_tokens.weight"]
    assert torch.equal(embeddings, torch.from_numpy(values["token_embd.weight"]).bfloat16())
    expected = sorted(float(torch.from_numpy(v).bfloat16().double().sum()) for v in values.values())
    assert sorted(float(t.double().sum()) for t in loaded.values()) == expected
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings == tied
    assert model.config.rope_parameters["rope_theta"] == 5000.0


def test_config_says_what_the_file_says(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tied=True)
    convert_llama(tmp_path / "model.gguf", tmp_path / "out", source="a test")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["head_dim"]) == (1e-05, HEAD_DIM)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [t["content"] for t in tokenizer["added_tokens"]] == ["<pad>", "<bos>", "<eos>"]
    assert tokenizer["model"]["merges"] == ["t 0"]


def test_bfloat16_rounds_like_torch() -> None:
    import torch

    rng = np.random.default_rng(1)
    values = (rng.standard_normal(100_000) * 10.0 ** rng.integers(-40, 38, 100_000)).astype("<f4")
    ties = (np.arange(2**16, dtype="<u4") << 16 | 0x8000).view("<f4")
    values = np.concatenate([values, ties[np.isfinite(ties)]])
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), expected)
