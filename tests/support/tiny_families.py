"""Recipes of tiny checkpoints beyond plain decoders, for `tiny_models.make_tiny_model`.

Experts, latent attention, classic families with biases and fused projections, and hybrids. Where a
recipe starts with "own", nothing of the common sizes applies.
"""

from typing import Any

from support.tiny_media import MEDIA

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED: dict[str, Any] = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Sizes for which vLLM has latent attention on CPUs.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
_NEOX: dict[str, Any] = {"num_key_value_heads": 4}
_GPT2: dict[str, Any] = {
    "own": True,
    "vocab_size": 259,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA2: dict[str, Any] = {
    "own": True,
    "vocab_size": 259,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 32,
    "state_size": 32,
    "n_groups": 2,
    "expand": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 128},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_ROUTED, "n_shared_experts": 1, "head_dim": 32, "use_qk_norm": True},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "shared_intermediate_size": 128,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": (
        "PhimoeConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "architectures": ["PhiMoEForCausalLM"],
            "lm_head_bias": True,
            "attention_bias": True,
        },
    ),
    "dots1": ("Dots1Config", {**_ROUTED, "n_shared_experts": 2, "head_dim": 32}),
    "ernie45_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "sliding_window": 16,
            "intermediate_size": 128,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 32,
            "intermediate_size_mlp": 256,
            "intermediate_size": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
            "num_hidden_layers": 4,
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "own": True,
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "vocab_size": 259,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 64,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "ffn_act_fn": {"name": "silu"},
                "hidden_size": 128,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_ROUTED,
            **_LATENT,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_ROUTED,
            **_LATENT,
            "n_shared_experts": 1,
            "q_lora_rank": 32,
            "topk_method": "noaux_tc",
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**_ROUTED, **_LATENT, "n_shared_experts": 1, "q_lora_rank": 32},
    ),
    "minicpm3": (
        "MiniCPM3Config",
        {
            "q_lora_rank": 32,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", {**_GPT2, "multi_query": True}),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 16, "tie_word_embeddings": False}),
    "opt": (
        "OPTConfig",
        {
            "own": True,
            "vocab_size": 259,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "ffn_dim": 256,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "opt_350m": (
        "OPTConfig",
        {
            "own": True,
            "vocab_size": 259,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "ffn_dim": 256,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "bias": False,
            "alibi": False,
            "ffn_hidden_size": 512,
        },
    ),
    "falcon_7b": (
        "FalconConfig",
        {
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "ffn_hidden_size": 512,
        },
    ),
    "falcon_rw": (
        "FalconConfig",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
            "ffn_hidden_size": 512,
        },
    ),
    "phi": ("PhiConfig", {**_NEOX, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None, "tie_word_embeddings": True}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "cohere": ("CohereConfig", {"use_qk_norm": False}),
    "cohere_plus": ("CohereConfig", {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {"sliding_window": 16, "num_hidden_layers": 4}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "bloom": (
        "BloomConfig",
        {
            "own": True,
            "vocab_size": 259,
            "hidden_size": 128,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mpt": (
        "MptConfig",
        {
            "own": True,
            "vocab_size": 259,
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            # transformers builds four whatever the config says.
            "expansion_ratio": 4,
            "max_seq_len": 256,
            "no_bias": True,
        },
    ),
    "glm": ("GlmConfig", {"head_dim": 32}),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    "exaone4": ("Exaone4Config", {"sliding_window": 16, "sliding_window_pattern": 4}),
    "nemotron": ("NemotronConfig", {"head_dim": 32}),
    "persimmon": ("PersimmonConfig", {**_NEOX, "qk_layernorm": True}),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}),
    "arcee": ("ArceeConfig", {}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 32}),
    "ernie45": ("Ernie4_5Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 32}),
    "helium": ("HeliumConfig", {"head_dim": 32}),
    "hyperclovax": ("HyperCLOVAXConfig", {"use_post_norm": True, "attention_multiplier": 0.2}),
    "olmo": ("OlmoConfig", {}),
    "cwm": ("CwmConfig", {"head_dim": 32, "sliding_window": 16}),
    "apertus": ("ApertusConfig", {}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "mamba": (
        "MambaConfig",
        {
            "own": True,
            "vocab_size": 259,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "state_size": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mamba2": ("Mamba2Config", _MAMBA2),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "position_embedding_type": "rope",
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 64,
            "head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_ssm": 256,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "head_dim": 32,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
        },
    ),
}

UNSHARDED = (
    "apertus",  # vLLM stores scalars of its activation beside the weights
    "bamba",  # vLLM 0.32 has no class for it
    "dbrx",
    "ernie45_moe",
    "gemma4_small",  # vLLM has its last layers in another module
    "glm",  # cut otherwise by way of transformers' class
    "gpt_bigcode",
    "lfm2",
    "minimax_m2",
    "mpt",
    "persimmon",  # vLLM does not cut it
    "phi",  # vLLM has the bias of the head only after it loaded a plain checkpoint
)
"""What is refused: vLLM's names of these are not known, or its CPU build cannot build them."""

SHARDED = tuple(name for name in (*FAMILIES, *MEDIA) if name not in UNSHARDED)
