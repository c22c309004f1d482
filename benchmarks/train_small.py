"""Train a small Llama whose weights were never quantized, to judge quantization methods by.

usage: train_small.py --prepare DIR [--text DIRECTORY ...]
       train_small.py --train DIR OUT [--minutes 6] [--layers 8]

Small models that a package registry carries come from 4-bit files: round-to-nearest looks better on
them than on weights of full precision. `--prepare` collects English of Python environments
(docstrings, comments and documentation, each paragraph once) and a BPE tokenizer trained on it,
compressed, so that both can travel to a machine without a network. `--train` needs a GPU for the
six minutes; on a CPU it runs as well, for a test.

Three texts share no paragraph: the one trained on, `calibration.txt` (docstrings of the standard
library) and the test text (`pydoc_data.topics`, which is never read for the other two).
"""

import argparse
import ast
import hashlib
import lzma
import math
import random
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

VOCABULARY = 6144
WINDOW = 512
END = "<|endoftext|>"
_COMPRESSED_BYTES = 24 * 2**20
_HELD_OUT = 64
"""Windows of the collected text that are not trained on."""


def topics() -> str:
    """The test text: the reference of the language, as `help()` shows it."""
    from pydoc_data.topics import topics as by_name

    return "\n\n".join(by_name.values())


def docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def comments(source: str) -> Iterator[str]:
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n){2,}", source, re.MULTILINE):
        yield re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE)


def text_of(path: Path) -> str:
    """The English of a file; nothing of what is not UTF-8 or does not parse."""
    try:
        if path.stat().st_size > 2**21:
            return ""
        source = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            return source
        return "\n\n".join([*docstrings(source), *comments(source)])
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ""


def paragraphs(text: str) -> Iterator[str]:
    """What reads like English, of 60 to 4000 characters."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        cleaned = "\n".join(line.rstrip() for line in paragraph.splitlines()).strip("\n")
        if 60 <= len(cleaned) <= 4000:
            plain = sum(c.isascii() and (c.isalpha() or c in " ,.\n") for c in cleaned)
            needed = 0.85 if " the " in cleaned else 0.9
            if plain > needed * len(cleaned) and cleaned.count(" ") > 7:
                yield cleaned


def _key(paragraph: str) -> bytes:
    """Equal for paragraphs that differ in white space, digits or case alone."""
    words = re.sub(r"[^a-z]+", "", paragraph.lower())
    return hashlib.blake2b(words.encode(), digest_size=8).digest()


def calibration() -> str:
    """Docstrings of the standard library, in the order of the files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    kept: dict[bytes, str] = {}
    tested = {_key(p) for p in paragraphs(topics())}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if inside[0] in ("site-packages", "pydoc_data", "test", "lib2to3", "idlelib"):
            continue
        for found in docstrings_of(path):
            for paragraph in paragraphs(found):
                kept.setdefault(_key(paragraph), paragraph)
    return "\n\n".join(p for key, p in kept.items() if key not in tested)


def docstrings_of(path: Path) -> list[str]:
    try:
        return [*docstrings(path.read_text(encoding="utf-8"))]
    except (ValueError, SyntaxError):
        return []


def documents(directories: Iterable[Path], seen: set[bytes]) -> Iterator[str]:
    """One text for each file, without the paragraphs that an earlier one had."""
    suffixes = {".py", ".md", ".rst", ".txt", ".pyi"}
    paths = [
        path
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.suffix in suffixes and "pydoc_data" not in path.parts
    ]
    with ProcessPoolExecutor() as pool:
        for text in pool.map(text_of, paths, chunksize=64):
            fresh = []
            for paragraph in paragraphs(text):
                key = _key(paragraph)
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            if sum(map(len, fresh)) > 200:
                yield "\n\n".join(fresh)


def prepare(out: Path, directories: Iterable[Path]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    out.mkdir(parents=True, exist_ok=True)
    calibrating = calibration()
    (out / "calibration.txt").write_text(calibrating)
    seen = {_key(p) for text in (topics(), calibrating) for p in paragraphs(text)}
    collected = [*documents(directories, seen)]
    random.Random(0).shuffle(collected)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(collected[:8000], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    packer, size, written, used = lzma.LZMACompressor(preset=6), 0, 0, 0
    with open(out / "corpus.txt.xz", "wb") as file:
        for document in collected:
            size += file.write(packer.compress(document.encode() + b"\0"))
            written, used = written + len(document), used + 1
            if size > _COMPRESSED_BYTES:
                break
        size += file.write(packer.flush())
    print(
        f"{used} of {len(collected)} documents, {written / 1e6:.0f} MB, {size / 2**20:.1f} MiB "
        f"compressed; {len(calibrating) / 1e6:.1f} MB to calibrate with"
    )


def tokens(prepared: Path) -> Any:
    """All of the text in windows, shaped [windows, WINDOW + 1]."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    text = lzma.decompress((prepared / "corpus.txt.xz").read_bytes()).decode()
    end = tokenizer.token_to_id(END)
    flat: list[int] = []
    for encoding in tokenizer.encode_batch_fast(text.split("\0")):
        flat += encoding.ids
        flat.append(end)
    count = len(flat) // (WINDOW + 1)
    return torch.tensor(flat[: count * (WINDOW + 1)], dtype=torch.int16).view(count, WINDOW + 1)


def config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def train(prepared: Path, out: Path, minutes: float, layers: int) -> None:
    import torch
    import torch._dynamo
    from torch.nn.functional import cross_entropy
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    started = time.monotonic()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = tokens(prepared).to(device)
    held, data = data[:_HELD_OUT].long(), data[_HELD_OUT:]
    model = LlamaForCausalLM(config(layers)).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * layers)
    batch = 256 if device == "cuda" else 4
    # Where there is no C compiler for it, the model runs as it is.
    torch._dynamo.config.suppress_errors = True
    step_model = torch.compile(model) if device == "cuda" else model
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(windows: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            logits = step_model(input_ids=windows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def held_out() -> float:
        model.eval()
        with torch.no_grad():
            losses = [loss_of(part).item() for part in held.split(batch)]
        model.train()
        return sum(losses) / len(losses)

    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{data.numel() / 1e6:.1f}M tokens on {device}",
        flush=True,
    )
    # Nothing is known of the speed before: the schedule follows the clock.
    step, shown, clock, until = 0, 0.0, time.monotonic(), started + 60 * minutes
    order = torch.randperm(len(data), device=device)
    while time.monotonic() < until:
        part = torch.arange(step * batch, (step + 1) * batch, device=device) % len(data)
        now = min((time.monotonic() - clock) / max(until - clock, 1), 1.0)
        rate = 2e-3 * min((step + 1) / 200, 0.05 + 0.95 * (1 + math.cos(math.pi * now)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(data[order[part]].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            loss.item()
            clock = time.monotonic()
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"{shown - started:4.0f} s step {step} loss {loss.item():.3f}", flush=True)
    seen = step * batch * WINDOW / 1e6
    print(f"{step} steps, {seen:.0f}M tokens, held-out loss {held_out():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="15MB")
    PreTrainedTokenizerFast(
        tokenizer_file=str(prepared / "tokenizer.json"), bos_token=END, eos_token=END
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prepare", type=Path, metavar="DIR")
    parser.add_argument("--text", type=Path, nargs="*", help="default: this site-packages")
    parser.add_argument("--train", type=Path, nargs=2, metavar=("DIR", "OUT"))
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.prepare:
        default = [Path(sysconfig.get_paths()["purelib"])]
        prepare(arguments.prepare, arguments.text or default)
    elif arguments.train:
        train(*arguments.train, arguments.minutes, arguments.layers)
    else:
        sys.exit(parser.format_usage())


if __name__ == "__main__":
    main()
