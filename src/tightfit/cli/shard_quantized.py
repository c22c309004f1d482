"""`tightfit shard --quantize`: what `quantize` would write, cut without being written."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.cli.quantize_request import FLAGS, require_packages, wish_from
from tightfit.errors import UsageError
from tightfit.model.quantization import written
from tightfit.model.quantization.written import Wish
from tightfit.quantize.recipe_file import DATA_FREE, METHODS, document_of, wish_of

SCHEMES = tuple(scheme for scheme in written.SCHEMES if scheme != "nvfp4")
"""Those that need no data: activations of the others have calibrated scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnTheWay:
    """What is to become of the weights on the way."""

    wish: Wish
    method: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A checkpoint whose tensors are computed when they are read, with what `prepare` has to know.

    `document` says how, and `bundles` which tensors are computed together.
    """

    checkpoint: Checkpoint
    document: Mapping[str, Any]
    bundles: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def asked_from(
    scheme: str | None,
    recipe: Path | None,
    *,
    group_size: int | None,
    file_format: str | None,
    ignore: Sequence[str],
    method: str | None,
) -> OnTheWay | None:
    """What the flags ask for together; None if the weights stay as they are.

    Raises:
        UsageError: they contradict each other, or what they ask for needs calibration, or is
            unknown.
        MissingExtraError: torch is not installed.
    """
    details = {
        "--group-size": group_size,
        "--format": file_format,
        "--ignore": ignore[0] if ignore else None,
        "--method": method,
    }
    if scheme is None and recipe is None:
        for flag, value in details.items():
            if value is not None:
                raise UsageError(f"{flag} {value} without --quantize", hint="--quantize SCHEME")
        return None
    wish = wish_from(
        recipe,
        scheme=scheme,
        group_size=group_size,
        file_format=file_format,
        kv_cache=None,
        ignore=ignore,
        flags={**FLAGS, "scheme": "--quantize"},
    )
    method = DATA_FREE[0] if method is None else method
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", hint="--method " + "|".join(DATA_FREE))
    has_static = any(choice.scheme not in SCHEMES for choice in wish.choices)
    if method not in DATA_FREE or wish.kv_cache or has_static:
        what = f"--method {method}" if method not in DATA_FREE else wish.label
        what = "a quantized KV cache" if wish.kv_cache else what
        raise UsageError(
            f"{what} needs calibration, and `shard` has no data",
            hint="`tightfit quantize` first, and shard its output",
        )
    require_packages("shard --quantize")
    return OnTheWay(wish=wish, method=method, ignored=tuple(ignore))


def quantized(checkpoint: Checkpoint, asked: OnTheWay) -> Quantized:
    """The quantized checkpoint, of which nothing is computed yet; torch has to be installed.

    Raises:
        TightfitError: as `quantize.job.prepare`.
    """
    from tightfit.quantize.computed_source import ComputedSource
    from tightfit.quantize.job import matching_nothing, prepare

    job = prepare(checkpoint, asked.wish, method=asked.method)
    virtual = job.virtual
    assert isinstance(virtual.source, ComputedSource)
    return Quantized(
        checkpoint=virtual,
        document={"method": asked.method, **document_of(asked.wish)},
        bundles=virtual.source.bundles(),
        remarks=tuple(matching_nothing(job, asked.ignored)),
    )


def computing(made: Quantized | None) -> AbstractContextManager[None]:
    """What has to hold while a checkpoint is written that is quantized on the way, if it is."""
    if made is None:
        return nullcontext()
    from tightfit.quantize.write import one_thread_each

    return one_thread_each()


def again(checkpoint: Checkpoint, document: Mapping[str, Any], where: str) -> Checkpoint:
    """A checkpoint, quantized once more as a manifest says of what was cut from it.

    Raises:
        UsageError: the manifest is of another version of tightfit.
        MissingExtraError: torch is not installed.
        TightfitError: as `quantize.job.prepare`.
    """
    require_packages("verify")
    recipe = {name: value for name, value in document.items() if name != "method"}
    asked = OnTheWay(wish=wish_of(recipe, where), method=str(document.get("method")))
    return quantized(checkpoint, asked).checkpoint
