"""What `quantize` does, one after the other: find a recipe, calibrate, write, measure."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.cli.output import NoProgress, note, warn
from tightfit.cli.quantize_request import calibration_from, fingerprint, read_text
from tightfit.errors import UsageError
from tightfit.executors import Executor
from tightfit.model.quantization.written import Wish
from tightfit.quantize.admission import lost_sizes
from tightfit.quantize.calibration import CalibrationOptions, calibrate, is_needed
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
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.write import WriteJob, is_there, write, write_job

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
    size, budget = asked.for_tp or 1, None
    text = _checked_text(checkpoint, asked)
    if wish is None:
        from tightfit.quantize.budget import fit_budget

        assert asked.budget_bytes is not None
        budget = fit_budget(
            checkpoint,
            asked.budget_bytes,
            ignored=asked.ignored,
            tensor_parallel_size=size,
            search=asked.method == "mse",
            calibration=asked.calibration(None),
            progress=bars,
        )
        wish = budget.wish
    options = asked.calibration(wish)
    job = prepare(checkpoint, wish, method=asked.method, tensor_parallel_size=size)
    for remark in _remarks(job, asked):
        warn(remark)
    calibrated = options if is_needed(wish, asked.method) else None
    measured = asked.evaluate is not None or asked.report is not None or asked.sensitivity
    if asked.dry_run and calibrated is not None and measured:
        raise UsageError(
            "nothing is calibrated in a dry run, so there is nothing to measure",
            hint="leave out --dry-run, or --evaluate, --report and --sensitivity",
        )
    if asked.sensitivity and options is not None and calibrated is None:
        # Only for its refusal, which would else come when all is written.
        token_windows(checkpoint, options)
    known = {} if calibrated is None else fingerprint(calibrated, asked.backend)
    files = write_job(job, max_shard_bytes=asked.max_shard_bytes, calibration=known)
    written, fresh = None, not asked.dry_run
    if not asked.dry_run:
        if calibrated is None:
            fresh = _write(files, asked, executor, bars)
        elif is_there(files, asked.out, bars, resume=asked.resume):
            fresh = False
        else:
            with _calibration_directory(asked) as directory:
                given = _given(job, calibrated, directory, asked, bars)
                job = prepare(
                    checkpoint, wish, method=asked.method, tensor_parallel_size=size, given=given
                )
                files = write_job(job, max_shard_bytes=asked.max_shard_bytes, calibration=known)
                _write(files, asked, executor, bars)
        written = open_checkpoint(asked.out)
    quality = sensitivity = None
    if asked.report is not None or asked.sensitivity:
        from tightfit.quantize.quality import measure

        quality = measure(job, written, progress=bars)
    if asked.sensitivity:
        assert quality is not None
        sensitivity = _sensitivity(job, written, quality, options, bars)
    if asked.report is not None:
        assert quality is not None
        from tightfit.cli.report.quality import write_quality_report

        write_quality_report(
            asked.report,
            quality.to_json(),
            sensitivity=None if sensitivity is None else sensitivity.to_json(),
            budget=None if budget is None else budget.to_json(),
        )
    return Done(
        job=job,
        files=files,
        fresh=fresh,
        budget=budget,
        quality=quality,
        sensitivity=sensitivity,
        perplexity=None if text is None else _perplexity(job, written or job.virtual, text, bars),
    )


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


def _remarks(job: QuantizeJob, asked: Asked) -> Iterator[str]:
    """What stops nothing."""
    if asked.for_tp is None:
        lost = lost_sizes(job.spec, job.wish, job.decisions)
        if lost:
            sizes = " and ".join(map(str, lost))
            first = next(iter(lost.values()))
            yield (
                f"the model can be cut for tensor parallel size {sizes}, and not when quantized "
                f"like this: {first}; {first.remedy} (--for-tp checks a size)"
            )
    names = [*job.decisions, *job.checkpoint.tensors()]
    for pattern in asked.ignored:
        if not any(re.search(pattern, name) for name in names):
            yield f"--ignore {pattern!r} matches nothing"
