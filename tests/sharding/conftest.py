from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine heads in three groups, and an inner size that nothing divides."""
    import torch
    import transformers as T

    torch.manual_seed(5)
    config = T.LlamaConfig(
        vocab_size=130,
        hidden_size=144,
        intermediate_size=203,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        attention_bias=True,
    )
    directory = tmp_path_factory.mktemp("odd")
    T.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory
