"""vLLM's command line as data: which flags there are, what they take, and which matter to memory.

Read in 0.32 (`engine/arg_utils.py`, `entrypoints/launchers/cli_args.py`) and, for names that are
gone, in 0.8.5 to 0.27. Names are those of argparse: no dashes in front, underscores within.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["bool", "int", "tokens", "length", "float", "str", "json", "ints", "list", "maybe"]
"""What a flag takes: nothing (bool), a number that may have a suffix (tokens), or also `auto`
(length), one value, JSON (also dotted), one or more values, or at most one (maybe)."""

_MEMORY: Mapping[Kind, str] = {
    "bool": """enforce_eager enable_expert_parallel enable_prefix_caching enable_chunked_prefill
        async_scheduling disable_hybrid_kv_cache_manager skip_mm_profiling language_model_only
        enable_lora enable_sleep_mode sleep_mode_offload_cudagraph enable_cumem_allocator enable_dbo
        enable_eplb enable_elastic_ep enable_hc_sp enable_batch_sharded_sampling dcp_q_replicate
        kv_sharing_fast_prefill disable_sliding_window fully_sharded_loras mm_encoder_only
        enable_tower_connector_lora enable_mixed_moe_lora_format specialize_active_lora
        enable_moe_shared_loras use_replayssm swa_bounded_replay enable_return_routed_experts
        enable_prompt_embeds enable_mm_embeds enable_mamba_shared_prefix_checkpoint""",
    "int": """tensor_parallel_size pipeline_parallel_size data_parallel_size max_num_seqs
        decode_context_parallel_size prefill_context_parallel_size max_cudagraph_capture_size
        block_size num_gpu_blocks_override api_server_count max_loras max_lora_rank max_cpu_loras
        data_parallel_size_local mamba_block_size max_num_active_seqs max_num_scheduled_tokens
        renderer_num_workers mm_shm_cache_max_object_size_mb offload_group_size offload_num_in_group
        offload_prefetch_step ubatch_size elastic_ep_max_dp_size replayssm_buffer_len spec_tokens
        prefix_cache_retention_interval max_parallel_loading_workers lora_extra_vocab_size""",
    "tokens": "max_num_batched_tokens kv_cache_memory_bytes",
    "length": "max_model_len",
    "float": """gpu_memory_utilization mm_processor_cache_gb cpu_offload_gb kv_offloading_size
        mm_ipc_gpu_memory_gb video_pruning_rate""",
    "str": """dtype kv_cache_dtype quantization load_format mamba_cache_dtype mamba_ssm_cache_dtype
        mm_processor_cache_type mm_encoder_tp_mode runner convert attention_backend moe_backend
        linear_backend kv_offloading_backend offload_backend mamba_cache_mode performance_mode
        lora_dtype mm_encoder_attn_dtype model_impl spec_method spec_model optimization_level
        mm_processor_device""",
    "json": """compilation_config limit_mm_per_prompt mm_processor_kwargs speculative_config
        hf_overrides quantization_config kv_transfer_config ec_transfer_config attention_config
        kernel_config eplb_config diffusion_config pooler_config additional_config engram_config
        weight_transfer_config ec_manager_config model_class_overrides""",
    "ints": "cudagraph_capture_sizes",
    "list": "kv_cache_dtype_skip_layers cpu_offload_params offload_params lora_modules",
}
"""What can change the memory of a rank or of the host. A plan takes those that `PlanOptions` has a
field for, and the user hears about the others."""

_NO_EFFECT: Mapping[Kind, str] = {
    "bool": """headless grpc trust_request_chat_template trust_request_mm_kwargs
        return_tokens_as_token_ids enable_auto_tool_choice exclude_tools_when_tool_choice_none
        enable_prompt_tokens_details enable_per_request_metrics enable_server_load_tracking
        enable_force_include_usage enable_tokenizer_info_endpoint enable_log_outputs
        enable_log_deltas cohere_is_reasoning_model log_error_stack tokens_only enable_scale_out
        disable_uvicorn_access_log allow_credentials enable_ssl_refresh enable_request_id_headers
        disable_fastapi_docs enable_offline_docs enable_flash_late_interaction trust_remote_code
        allow_deprecated_quantization return_sampling_mask use_fp64_gumbel enable_trace_replay
        disable_cascade_attn skip_tokenizer_init enable_nccl_comm_suspend use_tqdm_on_load
        enable_mamba_cache_stochastic_rounding numa_bind data_parallel_hybrid_lb
        data_parallel_external_lb data_parallel_multi_port_external_lb enable_ep_weight_filter
        enable_shm_tensor_arena disable_nccl_for_dp_synchronization ray_workers_use_nsight
        disable_custom_all_reduce enable_fault_tolerance interleave_mm_strings
        mm_device_do_normalize kv_cache_metrics cudagraph_metrics enable_layerwise_nvtx_tracing
        enable_mfu_metrics enable_logging_iteration_details jit_monitor_verbose
        long_prefill_token_threshold_adaptive disable_chunked_mm_input scheduler_reserve_full_isl
        enable_flashinfer_autotune disable_log_stats aggregate_engine_logging
        fail_on_environ_validation enable_log_requests disable_log_requests enable_reasoning
        disable_frontend_multiprocessing disable_async_output_proc multi_step_stream_outputs
        use_v2_block_manager worker_use_ray engine_use_ray monokernel""",
    "int": """sse_keep_alive_interval port grpc_port data_parallel_supervisor_port
        dp_supervisor_probe_failure_threshold ssl_cert_reqs h11_max_incomplete_event_size
        h11_max_header_count seed max_logprobs safetensors_prefetch_num_threads
        mamba_cache_philox_rounds master_port nnodes node_rank dcp_kv_cache_interleave_size
        cp_kv_cache_interleave_size data_parallel_rank data_parallel_start_rank
        data_parallel_rpc_port dbo_decode_token_threshold dp_sync_interval
        dbo_prefill_token_threshold long_prefill_token_threshold prefill_schedule_interval
        stream_interval shutdown_timeout max_num_queued_reqs max_num_queued_tokens
        max_num_partial_prefills max_long_partial_prefills num_lookahead_slots num_scheduler_steps
        scheduler_delay_factor tokenizer_pool_size max_log_len""",
    "str": """chat_template chat_template_content_format default_chat_template_kwargs response_role
        tool_call_parser tool_parser_plugin tool_strict_level tool_server cohere_format
        anthropic_disabled_thinking_effort fingerprint_mode fingerprint_value host
        dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s uds uvicorn_log_level
        disable_access_log_for_endpoints allowed_origins allowed_methods allowed_headers ssl_keyfile
        ssl_certfile ssl_ca_certs ssl_ciphers root_path middleware tokenizer tokenizer_mode
        hf_config_path allowed_local_media_path code_revision tokenizer_revision logprobs_mode
        config_format generation_config override_generation_config io_processor_plugin download_dir
        safetensors_load_strategy safetensors_prefetch_block_size model_loader_extra_config
        pt_load_map_location mamba_backend mamba_ssu_algorithm reasoning_parser
        reasoning_parser_plugin distributed_executor_backend master_addr distributed_timeout_seconds
        cpu_distributed_timeout_seconds device_ids dcp_comm_backend data_parallel_address
        data_parallel_backend all2all_backend expert_placement_strategy worker_cls
        worker_extension_cls fault_tolerance_config prefix_caching_hash_algo prefix_match_unit
        media_io_kwargs mm_hasher_algorithm mm_encoder_attn_backend mm_encoder_fp8_scale_path
        mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin video_pruning_method
        mm_tensor_ipc default_mm_loras max_lora_cls_labels logging_config log_level log_config_file
        show_hidden_metrics_for_version otlp_traces_endpoint per_request_spec_decode_metrics
        kv_cache_metrics_sample custom_histogram_buckets jit_monitor_mode scheduling_policy
        scheduler_cls watermark ir_op_priority sparse_indexer_topk_backend watermark_config
        kv_events_config reasoning_config structured_outputs_config aux_output_config
        profiler_config gdn_prefill_backend kda_prefill_backend kda_decode_backend
        guided_decoding_backend""",
    "list": """api_key allowed_media_domains served_model_name logits_processors ignore_patterns
        numa_bind_nodes numa_bind_cpus lora_target_modules collect_detailed_traces
        sleep_preserve_parameter_names""",
    "maybe": "hf_token",
}

_REMOVED_KINDS: Mapping[Kind, str] = {
    "bool": "disable_mm_preprocessor_cache calculate_kv_scales",
    "int": "max_seq_len_to_capture",
    "float": "swap_space rope_theta",
    "str": """task preemption_mode override_attention_dtype speculative_model device
        num_speculative_tokens""",
    "json": "rope_scaling",
    "ints": "cuda_graph_sizes",
}

KINDS: Mapping[str, Kind] = {
    name: kind
    for table in (_REMOVED_KINDS, _NO_EFFECT, _MEMORY)
    for kind, names in table.items()
    for name in names.split()
} | {"model": "str", "model_tag": "str", "revision": "str", "config": "str"}

MATTERS = frozenset(name for names in _MEMORY.values() for name in names.split())

SHORT: Mapping[str, str] = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "dpl": "data_parallel_size_local",
    "dpn": "data_parallel_rank",
    "dpr": "data_parallel_start_rank",
    "dpa": "data_parallel_address",
    "dpp": "data_parallel_rpc_port",
    "dpb": "data_parallel_backend",
    "dph": "data_parallel_hybrid_lb",
    "dpe": "data_parallel_external_lb",
    "dpm": "data_parallel_multi_port_external_lb",
    "dcp": "decode_context_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "ep": "enable_expert_parallel",
    "asc": "api_server_count",
    "cc": "compilation_config",
    "ac": "attention_config",
    "sc": "speculative_config",
    "dc": "diffusion_config",
    "q": "quantization",
    "n": "nnodes",
    "r": "node_rank",
    "O": "optimization_level",
}

ALIASES: Mapping[str, str] = {"device_memory_utilization": "gpu_memory_utilization"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A name that newer versions have not: since when, and what replaces it."""

    since: str
    successor: str


REMOVED: Mapping[str, Removed] = {
    "max_seq_len_to_capture": Removed(
        since="0.12",
        successor="--max-cudagraph-capture-size counts tokens of a batch, not of a sequence",
    ),
    "swap_space": Removed(
        since="0.19", successor="--kv-offloading-size keeps evicted blocks in host memory"
    ),
    "cuda_graph_sizes": Removed(
        since="0.15", successor="--cudagraph-capture-sizes, or --max-cudagraph-capture-size for one"
    ),
    "disable_mm_preprocessor_cache": Removed(since="0.15", successor="--mm-processor-cache-gb 0"),
    "rope_scaling": Removed(since="0.12", successor="--hf-overrides with rope_parameters"),
    "rope_theta": Removed(since="0.12", successor="--hf-overrides with rope_parameters"),
    "task": Removed(since="0.15", successor="--runner and --convert"),
    "preemption_mode": Removed(since="0.12", successor="the engine always recomputes"),
    "num_lookahead_slots": Removed(since="0.12", successor="--speculative-config"),
    "speculative_model": Removed(since="0.9", successor="--speculative-config"),
    "num_speculative_tokens": Removed(since="0.9", successor="--speculative-config"),
    "calculate_kv_scales": Removed(since="0.32", successor="scales in the checkpoint"),
    "override_attention_dtype": Removed(since="0.32", successor="nothing"),
    "max_num_partial_prefills": Removed(since="0.27", successor="nothing"),
    "max_long_partial_prefills": Removed(since="0.27", successor="nothing"),
    "device": Removed(since="0.10", successor="the build of vLLM, which decides"),
}

REMOVED_MATTERS = frozenset({"swap_space", "task", "speculative_model", "num_speculative_tokens"})
"""Those of them that can change memory where they are known, and that a plan does not model."""

HARMLESS_VALUES: Mapping[str, frozenset[str]] = {
    "runner": frozenset({"auto", "generate"}),
    "convert": frozenset({"auto", "none"}),
    "task": frozenset({"auto", "generate"}),
    "attention_backend": frozenset({"auto"}),
    "moe_backend": frozenset({"auto"}),
    "linear_backend": frozenset({"auto"}),
    "model_impl": frozenset({"auto", "vllm"}),
    "performance_mode": frozenset({"balanced"}),
    "kv_offloading_backend": frozenset({"native"}),
    "offload_backend": frozenset({"auto"}),
    "device": frozenset({"auto", "cuda"}),
}
"""Values that say what would be so anyway."""

ENVIRONMENT: Mapping[str, tuple[str, Kind]] = {
    "VLLM_USE_V2_MODEL_RUNNER": ("use_v2_model_runner", "bool"),
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": ("allow_long_max_model_len", "bool"),
    "VLLM_CPU_KVCACHE_SPACE": ("cpu_kvcache_space", "float"),
    "VLLM_MM_INPUT_CACHE_GIB": ("mm_processor_cache_gb", "float"),
}
"""Variables that stand for a field of `PlanOptions`."""

ENVIRONMENT_MATTERS = frozenset(
    [
        "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS",
        "VLLM_ENABLE_STARTUP_PLAN",
        "VLLM_KV_CACHE_LAYOUT",
        "VLLM_PP_LAYER_PARTITION",
        "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE",
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA",
        "VLLM_ATTENTION_BACKEND",
        "VLLM_FUSED_MOE_CHUNK_SIZE",
        "VLLM_USE_FLASHINFER_MOE_FP4",
        "VLLM_USE_FLASHINFER_MOE_FP8",
        "VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8",
        "VLLM_USE_FLASHINFER_MOE_MXFP4_BF16",
        "VLLM_ALL2ALL_BACKEND",
        "VLLM_MLA_DISABLE",
    ]
)
"""Variables that can change memory, and that a plan does not model."""
