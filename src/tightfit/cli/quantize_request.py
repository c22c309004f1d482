"""The options of `quantize`, checked against each other before anything is opened."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.checkpoint.source import is_remote, local_path_of
from tightfit.errors import MissingExtraError, UsageError
from tightfit.model.quantization.written import Wish
from tightfit.quantize.recipe_file import (
    DATA_FREE,
    KV_CACHE,
    METHODS,
    SHORTEST_SAMPLE,
    read_recipe,
    wish_of,
)

if TYPE_CHECKING:
    from tightfit.quantize.calibration import CalibrationOptions

BACKENDS = ("own", "optimum")
"""Who computes GPTQ."""


def require_packages(command: str = "quantize") -> None:
    """Say what to install if a package is missing that a `command` needs.

    Raises:
        MissingExtraError: one is.
    """
    for package in ("torch", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(command, "quantize", package)


def check_method(method: str, backend: str) -> None:
    """Refuse unknown names.

    Raises:
        UsageError: there is no such method, or no such backend of it.
    """
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r}", hint="--backend " + "|".join(BACKENDS))
    if backend != "own" and method != "gptq":
        raise UsageError(
            f"the backend {backend} does not have the method {method}", hint="--method gptq"
        )
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", hint="--method " + "|".join(METHODS))


def check_backend(backend: str, *, dequantize: bool) -> None:
    """Refuse a model that only our own backend can read.

    Raises:
        UsageError: it is decoded while it is read, which optimum does not do.
    """
    if dequantize and backend != "own":
        raise UsageError(
            f"the backend {backend} reads the files of the model, which --dequantize would decode",
            hint="leave out --backend, or --dequantize it to a checkpoint of its own first",
        )


def check_samples(samples: int, length: int) -> None:
    """Refuse numbers that are out of range, whether or not there is text.

    Raises:
        UsageError: one is.
    """
    for flag, value, least in (("samples", samples, 1), ("length", length, SHORTEST_SAMPLE)):
        if value < least:
            raise UsageError(
                f"--calibration-{flag} {value} is out of range", hint=f"at least {least}"
            )


def check_budget(budget: str, method: str, backend: str, flags: Mapping[str, object]) -> None:
    """Refuse what does not go with the recipes that a budget tries.

    Args:
        budget: as it was given.
        method: how values are chosen.
        backend: who computes it.
        flags: by name, those that say something of the recipe; None is not given.

    Raises:
        UsageError: one of them is given, or the method or the backend does not have the schemes.
    """
    for flag, value in flags.items():
        if value is not None:
            raise UsageError(
                f"--budget {budget} finds the recipe, and {flag} {value} is a part of one",
                hint=f"leave out {flag}",
            )
    if backend != "own":
        raise UsageError(
            f"--budget {budget} tries schemes that the backend {backend} does not have",
            hint="leave out --backend",
        )
    if method in ("awq", "smoothquant"):
        raise UsageError(
            f"--budget {budget} tries fp8-channel and w4a16, and the method {method} is not for "
            "both",
            hint="--method rtn, mse or gptq",
        )


def check_report(report: Path, out: str, *, dry_run: bool) -> None:
    """Refuse a report that could not be written in the end; a `dry_run` does not make `out`.

    Raises:
        UsageError: another suffix, or no such directory.
    """
    from tightfit.cli.report.quality import check_suffix

    check_suffix(report)
    place = os.path.abspath(report.parent)
    is_made = not (dry_run or is_remote(out)) and place == os.path.abspath(local_path_of(out))
    if not is_made and not os.path.isdir(place):
        raise UsageError(
            f"--report {report}: there is no directory {report.parent}", hint="make it first"
        )
    if os.path.isdir(report):
        raise UsageError(f"--report {report} is a directory", hint="give a file in it")
    try:
        os.lstat(report)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(
            f"--report {report} cannot be written: {error.strerror}", hint="give another file"
        ) from None


FLAGS: Mapping[str, str] = {
    "recipe": "--recipe",
    "scheme": "--scheme",
    "group_size": "--group-size",
    "format": "--format",
    "kv_cache": "--kv-cache",
    "ignore": "--ignore",
}
"""The options of `quantize` that say what a recipe says, by its keys."""


def wish_from(
    recipe: Path | None,
    *,
    scheme: str | None,
    group_size: int | None,
    file_format: str | None,
    kv_cache: str | None,
    ignore: Sequence[str],
    flags: Mapping[str, str] = FLAGS,
) -> Wish:
    """What a recipe and options ask for together; `flags` are what these are called.

    Raises:
        UsageError: they contradict each other, or one of them is wrong.
    """
    document: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    values = {"scheme": scheme, "group_size": group_size, "format": file_format}
    given = {key: v for key, v in {**values, "kv_cache": kv_cache}.items() if v is not None}
    for key, value in given.items():
        if document.get(key) not in (None, value):
            raise UsageError(
                f"{flags[key]} {value}, and {recipe} says {document[key]!r:.40}",
                hint=f"leave out {flags[key]}",
            )
        document[key] = value
    if recipe is None and scheme is None:
        if kv_cache is None or group_size is not None:
            raise UsageError(
                f"neither {flags['scheme']} nor {flags['recipe']} says what to make of the model",
                hint=f"{flags['scheme']} fp8-channel, for example",
            )
        raise UsageError(
            f"--kv-cache {kv_cache} goes with a scheme of weights",
            hint="--scheme fp8-channel, for example",
        )
    if kv_cache is not None and kv_cache not in KV_CACHE:
        raise UsageError(f"there is no --kv-cache {kv_cache!r}", hint=", ".join(KV_CACHE))
    where = flags["scheme"] if recipe is None else str(recipe)
    named = {key: flags[key] for key in (*given, "ignore")}
    return wish_of(document, where, ignore=ignore, flags=named)


def calibration_from(
    wish: Wish,
    method: str,
    texts: Sequence[Path],
    *,
    samples: int,
    length: int,
    seed: int,
    useful: bool,
    dry_run: bool = False,
) -> "CalibrationOptions | None":
    """What values are chosen with; None if none is needed, or wanted for what else it is `useful`.

    A `dry_run` chooses none, and goes without.

    Raises:
        UsageError: there is no text, and something needs it; or there is, and nothing does.
    """
    from tightfit.quantize.calibration import CalibrationOptions, is_needed

    needed = is_needed(wish, method)
    if not texts and (dry_run or not needed):
        return None
    if not texts:
        raise UsageError(
            f"{_reason(wish, method)} needs text to calibrate with",
            hint="--calibration FILE, a .txt or .jsonl like what the model will read",
        )
    if not needed and not useful:
        raise UsageError(
            f"--calibration is of no use to {wish.label} by the method {method}",
            hint="leave it out, or choose --method gptq, awq or smoothquant",
        )
    for text in texts:
        if not os.path.isfile(text):
            raise UsageError(f"there is no calibration text {text}", hint="check the path")
    return CalibrationOptions(texts=tuple(texts), samples=samples, length=length, seed=seed)


def read_text(path: Path) -> str:
    """A text to evaluate.

    Raises:
        UsageError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"cannot read the text {path}: {reason}", hint="give a plain text in UTF-8"
        ) from None


def fingerprint(options: "CalibrationOptions", backend: str) -> dict[str, Any]:
    """What values depend on beside the weights, without a word of the text.

    Raises:
        UsageError: a text cannot be read.
    """
    import xxhash

    digests = []
    for text in options.texts:
        digest = xxhash.xxh3_128()
        try:
            with open(text, "rb") as file:
                while data := file.read(2**20):
                    digest.update(data)
        except OSError as error:
            raise UsageError(
                f"cannot read the calibration text {text}: {error.strerror or error}",
                hint="check the path and its permissions",
            ) from None
        digests.append(digest.hexdigest())
    return {
        "backend": backend,
        "samples": options.samples,
        "length": options.length,
        "seed": options.seed,
        "texts": digests,
    }


def _reason(wish: Wish, method: str) -> str:
    if method not in DATA_FREE:
        return f"--method {method}"
    if wish.kv_cache:
        return "--kv-cache fp8"
    return "the scheme nvfp4, whose activations have scales of their own,"
