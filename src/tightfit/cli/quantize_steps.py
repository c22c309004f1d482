"""What `quantize` does, one after the other: find a recipe, calibrate, write, measure."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.cli.output import NoProgress, note, warn
from tightfit.cli.quantize_request import calibration_from, fingerprint, read_text
from tightfit.errors import UsageError
from tightfit.executors import Executor
from tightfit.model.quantization.written import Wish
from tightfit.quantize.admission import lost_sizes
from tightfit.quantize.calibration import CalibrationOptions, calibrate, is_needed, promised_scales
from tightfit.quantize.calibration.directory import (
    LAYERS,
    OPTIMUM,
    RefusedDirectoryError,
    directory_for,
    remove_own,
    require_own,
)
from tightfit.quantize.calibration.samples import token_windows
from tightfit.quantize.calibration.state import has_begun
from tightfit.quantize.computed_source import Kept
from tightfit.quantize.job import QuantizeJob, matching_nothing, prepare
from tightfit.quantize.write import WriteJob, check_out, is_there, write, write_job

if TYPE_CHECKING:
    from tightfit.quantize.budget import FittedRecipe
    from tightfit.quantize.evaluate import Perplexity
    from tightfit.quantize.quality import Quality
    from tightfit.quantize.sensitivity import Sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of a call, but for the recipe."""

    out: str
    method: str
    backend: str
    for_tp: int | None
    max_shard_bytes: int
    resume: bool
    dry_run: bool
    quiet: bool
    evaluate: Path | None
    report: Path | None
    sensitivity: bool
    budget_bytes: int | None
    ignored: tuple[str, ...]
    texts: tuple[Path, ...]
    samples: int
    length: int
    seed: int

    def calibration(self, wish: Wish | None) -> CalibrationOptions | None:
        """What to calibrate with; a recipe that is still to be found needs it for its method."""
        return calibration_from(
            wish or Wish(default=None),
            self.method,
            self.texts,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            useful=self.sensitivity or self.budget_bytes is not None,
            # A recipe that is yet to be found depends on the text.
            dry_run=self.dry_run and wish is not None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a call came to."""

    job: QuantizeJob
    files: WriteJob
    fresh: bool
    """Something was written, and not all of it there already."""
    budget: "FittedRecipe | None"
    quality: "Quality | None"
    sensitivity: "Sensitivity | None"
    perplexity: "tuple[Perplexity, Perplexity] | None"
    """Before and after."""


def carry_out(
    checkpoint: Checkpoint,
    wish: Wish | None,
    asked: Asked,
    executor: Executor | None,
    bars: NoProgress,
) -> Done:
    """Do all that was asked for; without a `wish` the budget decides.

    Raises:
        TightfitError: as `prepare`, `calibrate`, `write` and what measures.
    """
    # Whatever can be refused is refused before hours of work.
    if not asked.dry_run:
        check_out(checkpoint, asked.out, resume=asked.resume)
    text = _checked_text(checkpoint, asked)
    budget = None
    if wish is None:
        budget = _fitted(checkpoint, asked, bars)
        wish = budget.wish
    job = _job(checkpoint, wish, asked)
    options = asked.calibration(wish)
    _check_measures(job, options, asked)
    job, files, fresh = _carried_out(job, options, asked, executor, bars)
    written = None if asked.dry_run else open_checkpoint(asked.out)
    quality, sensitivity = _measured(job, written, options, budget, asked, bars)
    return Done(
        job=job,
        files=files,
        fresh=fresh,
        budget=budget,
        quality=quality,
        sensitivity=sensitivity,
        perplexity=None if text is None else _perplexity(job, written or job.virtual, text, bars),
    )


def _fitted(checkpoint: Checkpoint, asked: Asked, bars: NoProgress) -> "FittedRecipe":
    """The best recipe that is small enough."""
    from tightfit.quantize.budget import fit_budget

    assert asked.budget_bytes is not None
    return fit_budget(
        checkpoint,
        asked.budget_bytes,
        ignored=asked.ignored,
        tensor_parallel_size=asked.for_tp or 1,
        search=asked.method == "mse",
        calibration=asked.calibration(None),
        progress=bars,
    )


def _job(checkpoint: Checkpoint, wish: Wish, asked: Asked) -> QuantizeJob:
    """What is to be done, with what there is to say of it."""
    job = _prepared(checkpoint, wish, asked)
    for remark in () if asked.quiet or asked.for_tp is not None else _lost_sizes(job):
        warn(remark)
    for remark in matching_nothing(job, asked.ignored):
        warn(remark)
    return job


def _prepared(
    checkpoint: Checkpoint,
    wish: Wish,
    asked: Asked,
    given: Mapping[str, Kept] = MappingProxyType({}),
) -> QuantizeJob:
    size = asked.for_tp or 1
    return prepare(checkpoint, wish, method=asked.method, tensor_parallel_size=size, given=given)


def _check_measures(job: QuantizeJob, options: CalibrationOptions | None, asked: Asked) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: a dry run does not calibrate, or there is too little text.
    """
    needed = is_needed(job.wish, asked.method)
    measured = asked.evaluate is not None or asked.report is not None or asked.sensitivity
    if asked.dry_run and needed and measured:
        raise UsageError(
            "nothing is calibrated in a dry run, so there is nothing to measure",
            hint="leave out --dry-run, or --evaluate, --report and --sensitivity",
        )
    if asked.sensitivity and options is not None and not needed:
        # Only for its refusal, which would else come when all is written.
        token_windows(job.checkpoint, options)


def _carried_out(
    job: QuantizeJob,
    options: CalibrationOptions | None,
    asked: Asked,
    executor: Executor | None,
    bars: NoProgress,
) -> tuple[QuantizeJob, WriteJob, bool]:
    """The job with all that it depends on, its files, and whether any was written."""
    calibrated = options if is_needed(job.wish, asked.method) else None
    if asked.dry_run and job.wish.kv_cache:
        job = _prepared(job.checkpoint, job.wish, asked, promised_scales(job))
    known = {} if calibrated is None else fingerprint(calibrated, asked.backend)
    files = write_job(job, max_shard_bytes=asked.max_shard_bytes, calibration=known)
    if asked.dry_run:
        return job, files, False
    if calibrated is None:
        return job, files, _write(files, asked, executor, bars)
    files = files.noted()
    if is_there(files, asked.out, bars):
        return job, files, False
    with _calibration_directory(asked) as directory:
        given = _given(job, calibrated, directory, asked, bars)
        job = _prepared(job.checkpoint, job.wish, asked, given)
        files = write_job(
            job,
            max_shard_bytes=asked.max_shard_bytes,
            calibration=known,
            origin_states=files.origin_states,
        )
        _write(files, asked, executor, bars)
    return job, files, True


def _measured(
    job: QuantizeJob,
    written: Checkpoint | None,
    options: CalibrationOptions | None,
    budget: "FittedRecipe | None",
    asked: Asked,
    bars: NoProgress,
) -> "tuple[Quality | None, Sensitivity | None]":
    """Errors of matrices and damage by layers, with a page of them, as far as they are wanted."""
    if asked.report is None and not asked.sensitivity:
        return None, None
    from tightfit.quantize.quality import measure

    quality = measure(job, written, progress=bars)
    sensitivity = None
    if asked.sensitivity:
        sensitivity = _sensitivity(job, written, quality, options, bars)
    if asked.report is not None:
        from tightfit.cli.report.quality import write_quality_report

        write_quality_report(
            asked.report,
            quality.to_json(),
            sensitivity=None if sensitivity is None else sensitivity.to_json(),
            budget=None if budget is None else budget.to_json(),
        )
    return quality, sensitivity


def _checked_text(checkpoint: Checkpoint, asked: Asked) -> str | None:
    """The text to evaluate, which is refused before hours of work and not after them."""
    if asked.evaluate is None:
        return None
    from tightfit.quantize.evaluate import token_ids

    text = read_text(asked.evaluate)
    token_ids(checkpoint, text)
    return text


def _write(files: WriteJob, asked: Asked, executor: Executor | None, bars: NoProgress) -> bool:
    return write(files, asked.out, bars, resume=asked.resume, executor=executor, notice=note)


def _given(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    asked: Asked,
    bars: NoProgress,
) -> dict[str, Kept]:
    """The tensors that calibration makes."""
    if asked.backend == "own":
        return calibrate(job, options, directory, bars, resume=asked.resume, warn=warn)
    from tightfit.quantize.calibration.optimum_backend import calibrate_by_optimum

    return calibrate_by_optimum(job, options, directory, resume=asked.resume, warn=warn)


@contextmanager
def _calibration_directory(asked: Asked) -> Iterator[Path]:
    """For the files of a calibration, which are removed when the output has them."""
    directory = directory_for(asked.out)
    own = LAYERS if asked.backend == "own" else OPTIMUM
    require_own(directory, own, resume=asked.resume)
    try:
        yield directory
    except RefusedDirectoryError:
        raise
    except BaseException:
        if asked.backend != "own":
            remove_own(directory, own)  # There is no going on.
        elif has_begun(directory):
            note(f"{directory} has the layers that are calibrated; --resume goes on with them")
        raise
    remove_own(directory, own)


def _sensitivity(
    job: QuantizeJob,
    written: Checkpoint | None,
    quality: "Quality",
    options: CalibrationOptions | None,
    bars: NoProgress,
) -> "Sensitivity":
    from tightfit.quantize.sensitivity import output_sensitivity, weight_sensitivity

    if options is None:
        return weight_sensitivity(quality)
    with tempfile.TemporaryDirectory(prefix="tightfit-") as directory:
        return output_sensitivity(job, options, Path(directory), written=written, progress=bars)


def _perplexity(
    job: QuantizeJob, quantized: Checkpoint, text: str, bars: NoProgress
) -> "tuple[Perplexity, Perplexity]":
    from tightfit.quantize.evaluate import perplexity

    def measured(name: str, checkpoint: Checkpoint) -> "Perplexity":
        nbytes = sum(info.nbytes for info in checkpoint.tensors().values())
        bars.phase(name, nbytes)
        shown = 0

        def show(done: int, layers: int) -> None:
            nonlocal shown
            bars.advance(nbytes * done // layers - shown)
            shown = nbytes * done // layers

        return perplexity(checkpoint, text, progress=show)

    return measured("before", job.checkpoint), measured("after", quantized)


def _lost_sizes(job: QuantizeJob) -> Iterator[str]:
    """What the model allows, and its quantized form does not."""
    lost = lost_sizes(job.spec, job.wish, job.decisions)
    if lost:
        *others, last = map(str, lost)
        sizes = f"{', '.join(others)} and {last}" if others else last
        first, largest = next(iter(lost.values())), next(reversed(lost.values()))
        yield (
            f"the model can be cut for tensor parallel size {sizes}, and not when quantized like "
            f"this: {first.refusals[0]}; {largest.remedy} (--for-tp checks a size)"
        )
