"""vLLM's start-up logs: read them, and hold a plan against them."""

from tightfit.planner.vllm_log.compare import LogLine, compare, mismatches
from tightfit.planner.vllm_log.read import VLLMLog, read_log

__all__ = ["LogLine", "VLLMLog", "compare", "mismatches", "read_log"]
