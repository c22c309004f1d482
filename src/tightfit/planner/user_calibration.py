"""What a user's own start-ups have shown, kept in one file and added to later plans.

A record says, for one engine version, device, architecture and tensor parallel size, how many bytes
more than planned a component took. `plan --from-log` can add one; `make_plan` reads them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from tightfit.planner.plan import Plan
    from tightfit.planner.vllm_log.compare import LogLine

SCHEMA = 1
MAX_FILE_BYTES = 2**20
MAX_ADJUSTMENT_BYTES = 2**40

COMPONENTS: Mapping[str, str] = {
    "non_torch": "non_torch",
    "activations": "activation_peak",
    "cuda_graphs": "cuda_graphs_estimate",
}
"""Components that can be adjusted, each with the line of a log that measures it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Measured less planned bytes of some components of one kind of start-up."""

    engine: str
    version: str
    device: str
    architecture: str
    tensor_parallel_size: int
    adjustments: Mapping[str, int]
    source: str = ""
    """Where it was measured, such as the name of a log."""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What a plan must have in common with the start-up."""
        return (
            self.engine,
            self.version,
            self.device,
            self.architecture,
            self.tensor_parallel_size,
        )


def calibration_path() -> Path:
    """The user's file: `$XDG_CONFIG_HOME/tightfit/calibration.json` (XDG Base Directory)."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if given and Path(given).is_absolute() else Path.home() / ".config"
    return base / "tightfit" / "calibration.json"


def record_of(plan: "Plan", lines: Iterable["LogLine"], *, source: str = "") -> Record | None:
    """What a comparison of a plan with its log teaches; None if the log has no such line.

    Graphs learn only from vLLM's own estimate, because that is what the budget pays for.
    """
    differences = {line.name: line.difference for line in lines}
    found = {
        component: -round(difference)
        for component, line in COMPONENTS.items()
        if (difference := differences.get(line)) is not None
    }
    if not found or plan.device is None:
        return None
    return Record(
        engine=plan.engine,
        version=plan.engine_version,
        device=plan.device.name,
        architecture=plan.model.architecture,
        tensor_parallel_size=plan.options.tensor_parallel_size.value,
        adjustments=found,
        source=source,
    )


def add_record(record: Record, path: Path | None = None) -> Path:
    """Add a record, in the place of an older one of the same kind, and give back the file's path.

    Raises:
        ConfigError: the file that is there cannot be understood; it is left alone.
        OutputError: it cannot be written.
    """
    path = path or calibration_path()
    kept = [one for one in read_records(path) if one.key != record.key]
    document = {"schema": SCHEMA, "records": [asdict(one) for one in [*kept, record]]}
    new = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="check the directory"
        ) from error
    return path


def find_record(
    engine: str,
    version: str,
    device: str,
    architecture: str,
    tensor_parallel_size: int,
    path: Path | None = None,
) -> Record | None:
    """The record of exactly this kind of start-up.

    Raises:
        ConfigError: the file cannot be understood.
    """
    key = (engine, version, device, architecture, tensor_parallel_size)
    return next((one for one in read_records(path or calibration_path()) if one.key == key), None)


def adjustments(
    engine: str,
    version: str,
    device: str,
    architecture: str,
    tensor_parallel_size: int,
    path: Path | None = None,
) -> Mapping[str, int]:
    """Bytes to add to components, which may be negative; nothing if it was never measured.

    Raises:
        ConfigError: the file cannot be understood.
    """
    found = find_record(engine, version, device, architecture, tensor_parallel_size, path)
    return {} if found is None else found.adjustments


def read_records(path: Path) -> tuple[Record, ...]:
    """All records of a file; none if there is no file.

    Raises:
        ConfigError: it cannot be read, or is not such a file.
    """
    hint = "correct the file, or remove it: plans are then made without your measurements"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes", hint=hint)
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r} is not {SCHEMA}")
        return tuple(_record(entry) for entry in document["records"])
    except KeyError as error:
        raise ConfigError(f"{path} is no calibration file: no {error}", hint=hint) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no calibration file: {reason}", hint=hint) from error


def _record(entry: Any) -> Record:
    """One entry, with every field of its type.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not a record.
    """
    words = {name: entry[name] for name in ("engine", "version", "device", "architecture")}
    words["source"] = entry.get("source", "")
    size, found = entry["tensor_parallel_size"], entry["adjustments"]
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, not text")
    if type(size) is not int or size < 1:
        raise ValueError(f"tensor_parallel_size is {size!r}, not a number of ranks")
    for name, value in found.items():
        if name not in COMPONENTS:
            raise ValueError(f"{name!r} cannot be adjusted")
        if type(value) is not int or abs(value) > MAX_ADJUSTMENT_BYTES:
            raise ValueError(f"{name} is {value!r}, not a number of bytes")
    return Record(tensor_parallel_size=size, adjustments=dict(found), **words)
