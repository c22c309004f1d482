import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import CheckpointError, UsageError
from tightfit.runtime.text import Text, render_chat

CHAT = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('system must come first') }}
    {%- endif %}
<|{{ message.role }}|>{% generation %}{{ message.content | trim }}{% endgeneration %}
{% endfor %}
{{ {"ä": 1} | tojson }}{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <b>"}]


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    """A directory with a tokenizer whose tokens are bytes, so that characters are in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tiny_model("llama") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
                "eos_token": "</s>",
                "chat_template": CHAT,
            }
        )
    )
    return tmp_path


def text_of(model: Path) -> Text:
    return Text(open_checkpoint(str(model)))


def test_a_plain_prompt_gets_the_tokenizers_own_special_tokens(model: Path) -> None:
    assert text_of(model).encode("a")[0] == 0
    assert len(text_of(model).encode("a")) == 2


def test_chat_is_what_transformers_renders(model: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model)
    rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_chat(CHAT, MESSAGES, {"bos_token": "<s>"}) == rendered
    ids = text_of(model).encode_chat(MESSAGES)
    assert ids == theirs(rendered, add_special_tokens=False).input_ids
    assert ids.count(0) == 1


@pytest.mark.parametrize("where", ["jinja", "json", "list"])
def test_the_template_may_be_in_its_own_file(model: Path, where: str) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    if where == "jinja":
        (model / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    elif where == "json":
        (model / "chat_template.json").write_text('{"chat_template": "json"}')
    else:
        templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    expected = {"jinja": "jinja  Be brief. ", "json": "json", "list": "yes"}[where]
    text = text_of(model)
    assert text.tokenizer.decode(text.encode_chat(MESSAGES)) == expected


def test_a_template_that_refuses_is_one_line(model: Path) -> None:
    with pytest.raises(UsageError, match="chat template fails: system must come first"):
        text_of(model).encode_chat(MESSAGES[::-1])


def test_a_template_cannot_leave_its_sandbox() -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UsageError, match="chat template fails"):
        render_chat(escape, MESSAGES, {})


def test_no_template_is_said_so(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="has no chat template"):
        text_of(model).encode_chat(MESSAGES)


def test_text_streams_in_whole_characters(model: Path) -> None:
    written = "naïve 🙂 日本 café"
    text = text_of(model)
    stream = text.detokenizer()
    pieces = [stream.add(token) for token in text.encode(written)[1:]]
    pieces.append(stream.finish())
    assert "".join(pieces) == written
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) == 1


def test_a_cut_character_shows_at_the_end_only(model: Path) -> None:
    text = text_of(model)
    stream = text.detokenizer()
    pieces = [stream.add(token) for token in text.encode("ok🙂")[1:-1]]
    assert "".join(pieces) == "ok"
    assert stream.finish() == "\ufffd"


def test_text_full_of_replacement_characters_does_not_wait_for_its_end(model: Path) -> None:
    # Each token would cost as much as all before it, and a client can ask a model for such text.
    text = Text(open_checkpoint(str(model)))
    said = "\ufffd" * 100 + "ä"
    stream = text.detokenizer()
    pieces = [stream.add(token) for token in text.tokenizer.encode(said).ids[1:]]
    assert "".join(pieces) + stream.finish() == said
    assert sum(map(bool, pieces)) > 5


def test_stop_tokens(model: Path) -> None:
    assert text_of(model).stop_ids == {2}  # of the tiny model's config.json
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert text_of(model).stop_ids == {7, 8}


def test_missing_and_damaged_files(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json in .* is not JSON"):
        text_of(model)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json in .* cannot be read"):
        text_of(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        text_of(model)
