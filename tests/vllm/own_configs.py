"""Config classes that published checkpoints bring as code, and tiny ones come without."""


def register():
    from transformers import AutoConfig, PreTrainedConfig

    class InternVLChatConfig(PreTrainedConfig):
        model_type = "internvl_chat"

        def __init__(self, vision_config=None, llm_config=None, **others):
            super().__init__(**others)
            self.vision_config = PreTrainedConfig(**(vision_config or {}))
            inner = dict(llm_config or {"model_type": "qwen2"})
            self.llm_config = AutoConfig.for_model(inner.pop("model_type"), **inner)

    AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
