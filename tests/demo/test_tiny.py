import hashlib
import json
from pathlib import Path

import pytest

from tightfit.demo import tiny_checkpoint
from tightfit.errors import OutputError

MESSAGES = [{"role": "user", "content": "Zwölf × 7 = ?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("demo") / "tiny")


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_same_bytes_every_time(tiny: Path, tmp_path: Path) -> None:
    assert digests(tiny) == digests(tiny_checkpoint(tmp_path / "again"))
    # Other machines and other Python versions have to arrive here too.
    weights = digests(tiny)["model.safetensors"]
    assert weights == "19165ca1709e47fd280f9bd195e2b0c0d5133c95664e98ced0ae86d9c018df34"


def test_transformers_loads_all_of_it_and_generates(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert model(**prompt).logits.isfinite().all()
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > prompt["input_ids"].shape[1]


def test_tokenizer_gives_every_byte_back(tiny: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "".join(map(chr, range(256))) + "漢字 🦙 1234"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (
        tokenizer.get_vocab_size() == json.loads((tiny / "config.json").read_text())["vocab_size"]
    )


def test_chat_template_marks_the_turns(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nZwölf × 7 = ?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_leaves_a_full_directory_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        tiny_checkpoint(tmp_path)
    assert digests(tmp_path).keys() == {"config.json"}
    assert (tmp_path / "config.json").read_text() == "mine"
