"""The safetensors container: a length, a JSON header, and the tensors' bytes without gaps.

The header alone says the dtype, shape and byte range of each tensor, so a plan needs a few
kilobytes of a file, and a shard is a copy of byte ranges. A header comes from a stranger: all of it
is checked before any of it is used, as strictly as safetensors itself does it.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tightfit.errors import CheckpointError
from tightfit.units import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
"""`MAX_HEADER_SIZE` of safetensors' own reader (safetensors/src/tensor.rs)."""

_DOWNLOAD_AGAIN = "the file is incomplete or damaged; download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor in a safetensors file.

    `dtype` has safetensors' spelling ("BF16"), `offset` counts from the start of `file`, and
    `nbytes` is what the tensor takes there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Args:
        file: the name for messages, and for `TensorInfo.file`.
        size: bytes of the whole file.
        read: gives the bytes from `start` to `stop` of the file.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is not a whole and valid safetensors file.
    """
    if size < 8:
        _refuse(f"{file} has {size} bytes, and a safetensors file has at least 8")
    prefix = _exactly(file, read, 0, 8)
    if prefix == b"version ":
        _refuse(
            f"{file} is a Git LFS pointer and not the weights themselves",
            "fetch them with `git lfs pull`, or download the model with `hf download`",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _refuse(
            f"{file} states a header of {length} bytes, and safetensors allows "
            f"{MAX_HEADER_BYTES}; it is not a safetensors file",
            "an HTML page or a pickle may bear its name; download the file again",
        )
    if 8 + length > size:
        _refuse(f"{file} is truncated: its header ends at byte {8 + length} of {size}")
    entries = _parse(file, _exactly(file, read, 8, 8 + length))
    _check_metadata(file, entries.pop("__metadata__", None))
    data_bytes = size - 8 - length
    tensors = [
        _tensor(file, name, entry, 8 + length, data_bytes) for name, entry in entries.items()
    ]
    # Empty tensors share an offset with their neighbour, so the length decides between them.
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    end, previous = 8 + length, ""
    for info in tensors:
        if info.offset < end:
            _refuse(f"{file}: tensors {previous!r} and {info.name!r} overlap at byte {info.offset}")
        if info.offset > end:
            _refuse(f"{file}: no tensor has the {info.offset - end} bytes before {info.name!r}")
        end, previous = info.offset + info.nbytes, info.name
    if end != size:
        _refuse(f"{file} has {size} bytes, and its tensors end at byte {end}")
    return {info.name: info for info in tensors}


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    *,
    metadata: Mapping[str, str] | None = None,
    align: int = 4096,
) -> bytes:
    """Build the start of a safetensors file, up to the first byte of data.

    The JSON is padded with spaces, which the format allows, so that data starts at a multiple of
    `align` bytes: file systems share or copy whole blocks of it in the kernel.

    Args:
        tensors: (name, dtype, shape, nbytes) in the order of their bytes in the file.
        metadata: text that goes with the file, under `__metadata__`.
        align: what the length of the result is a multiple of.

    Raises:
        CheckpointError: the header would be larger than any reader accepts.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        assert name not in header, f"tensor {name!r} twice"
        assert name != "__metadata__", "a reserved name"
        assert dtype in DTYPE_BITS, f"dtype {dtype!r}"
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a file of {len(header)} tensors needs a header of {len(text)} bytes, and safetensors "
            f"allows {MAX_HEADER_BYTES}",
            hint="write more and smaller files (--max-shard-size)",
        )
    return len(text).to_bytes(8, "little") + text


def _refuse(message: str, hint: str = _DOWNLOAD_AGAIN) -> NoReturn:
    raise CheckpointError(message, hint=hint)


def _exactly(file: str, read: Callable[[int, int], bytes], start: int, stop: int) -> bytes:
    data = read(start, stop)
    if len(data) != stop - start:
        _refuse(f"{file} is truncated: {len(data)} of {stop - start} header bytes could be read")
    return data


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    _refuse(f"{file}: the header has {_show(key)} twice")
                seen.add(key)
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except UnicodeDecodeError as e:
        _refuse(f"{file}: the header is not UTF-8 text (byte {8 + e.start})")
    except RecursionError:
        _refuse(f"{file}: the header is nested too deeply")
    except ValueError as e:
        _refuse(f"{file}: the header is not JSON ({e})")
    if not isinstance(header, dict):
        _refuse(f"{file}: the header is not a JSON object but {_show(header)}")
    return header


def _check_metadata(file: str, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(f"{file}: __metadata__ is not an object of strings: {_show(metadata)}")


def _tensor(file: str, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
    if problem := _problem(name, entry, data_bytes):
        message, hint = problem
        _refuse(f"{file}: tensor {_show(name)} {message}", hint)
    start, stop = entry["data_offsets"]
    return TensorInfo(
        name=name,
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        file=file,
        offset=data_start + start,
        nbytes=stop - start,
    )


def _problem(name: str, entry: Any, data_bytes: int) -> tuple[str, str] | None:
    """What is wrong with one tensor's entry, and the hint; None if nothing is."""
    # JSON can spell half of a surrogate pair, which no file and no terminal can hold.
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        return "has a name that is not Unicode text", _DOWNLOAD_AGAIN
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return f"has no dtype, shape and data_offsets: {_show(entry)}", _DOWNLOAD_AGAIN
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {_show(dtype)}", f"known are {', '.join(DTYPE_BITS)}"
    if not _are_sizes(shape):
        return f"has the impossible shape {_show(shape)}", _DOWNLOAD_AGAIN
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has impossible data_offsets {_show(offsets)}", _DOWNLOAD_AGAIN
    start, stop = offsets
    if stop > data_bytes:
        return (
            f"ends at byte {stop} of the data, and the file holds {data_bytes}: it is truncated",
            _DOWNLOAD_AGAIN,
        )
    if _bits(shape, DTYPE_BITS[dtype], limit=8 * data_bytes + 64) != 8 * (stop - start):
        return (
            f"of dtype {dtype} and shape {_show(shape)} does not take the {stop - start} bytes "
            f"that its data_offsets {offsets} give it",
            _DOWNLOAD_AGAIN,
        )
    return None


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    # A loop, because headers have tens of thousands of these and a generator costs more.
    for value in values:  # noqa: SIM110
        if type(value) is not int or value < 0:
            return False
    return True


def _bits(shape: list[int], bits: int, *, limit: int) -> int:
    """Bits of the tensor, or some number above `limit`: the numbers stay small whatever it says."""
    if 0 in shape:
        return 0
    for n in shape:
        bits *= n
        if bits > limit:
            return limit + 1
    return bits


def _show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
