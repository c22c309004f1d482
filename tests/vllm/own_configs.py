"""What tiny multimodal models come without: configs that are code, processors, and tokenizers."""


def prepare():
    """Let vLLM build all of a model, towers included, and ask nobody about images."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm.config import ModelConfig

    class InternVLChatConfig(PreTrainedConfig):
        model_type = "internvl_chat"

        def __init__(self, vision_config=None, llm_config=None, **others):
            super().__init__(**others)
            self.vision_config = PreTrainedConfig(**(vision_config or {}))
            inner = dict(llm_config or {"model_type": "qwen2"})
            self.llm_config = AutoConfig.for_model(inner.pop("model_type"), **inner)

    AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
    ModelConfig._supports_multimodal_inputs = lambda self: False
