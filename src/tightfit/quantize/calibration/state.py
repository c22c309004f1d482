"""What calibration leaves behind after each layer, so that a killed one can go on.

`calibration.json` says what the work is, and has a checksum of the file of every layer that is done
and of the activations after the last of them. It is replaced when both are on disk: what it does
not vouch for does not count.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tightfit.checkpoint.disk import output_error, sync_directory
from tightfit.checkpoint.header import TensorInfo, encode_header
from tightfit.checkpoint.source import LocalSource
from tightfit.quantize.calibration.directory import LAYERS, RefusedDirectoryError, require_own
from tightfit.quantize.computed_source import Kept
from tightfit.quantize.differing import difference
from tightfit.runtime.loading.files import TORCH_DTYPES, TensorFile
from tightfit.sharding.progress import checksum

_JOURNAL = "calibration.json"
_HIDDEN = "hidden"
# Of several names for the same bytes the first.
_DTYPES = {dtype: name for name, dtype in reversed(TORCH_DTYPES.items())}


class State:
    """The directory of one calibration; `done` layers need not be calibrated again.

    Args:
        directory: where.
        identity: what has to be the same to go on.
        resume: go on; else the directory has to be new or empty.

    Raises:
        RefusedDirectoryError: it holds something else.
        OutputError: it cannot be written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self._directory = directory
        self._document: dict[str, Any] = {
            "identity": json.loads(json.dumps(identity)),
            "layers": [],
            "hidden": None,
        }
        require_own(directory, LAYERS, resume=resume)
        with self._errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._take_over()

    @property
    def done(self) -> int:
        """Layers that are complete."""
        return len(self._document["layers"])

    @property
    def has_begun(self) -> bool:
        """Whether there are activations to go on with."""
        return self._document["hidden"] is not None

    def hidden(self) -> Tensor:
        """The activations after the layers that are done, float32, where they lie in a file."""
        file = TensorFile(self._hidden_path(self.done))
        return file.view(file.tensors[_HIDDEN])

    def begin(self, shape: tuple[int, ...], batches: Iterable[Tensor]) -> None:
        """Store the activations before the first layer, float32 of a shape, some samples a time."""
        self._document["hidden"] = self._store_hidden(0, shape, batches)
        self._note()

    def add(
        self, shape: tuple[int, ...], batches: Iterable[Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        """Store a layer: the activations after it, and then what it comes to.

        Args:
            shape: of the activations.
            batches: of them, some samples at a time.
            tensors: by name; looked at when the last batch is there.
        """
        index = self.done
        hidden = self._store_hidden(index + 1, shape, batches)
        entries = [
            (name, _DTYPES[one.dtype], tuple(one.shape), one.nbytes)
            for name, one in tensors.items()
        ]
        path = self._layer_path(index)
        layer = self._store(path, encode_header(entries), tensors.values(), durable=True)
        self._document["layers"].append(layer)
        self._document["hidden"] = hidden
        self._note()
        with suppress(OSError):
            os.unlink(self._hidden_path(index))

    def kept(self) -> dict[str, Kept]:
        """The tensors of all layers, by name."""
        source = LocalSource(self._directory)
        found: dict[str, Kept] = {}
        for index in range(self.done):
            for name, info in self._tensors(index).items():
                found[name] = Kept(name=name, source=source, info=info)
        return found

    def _tensors(self, index: int) -> Mapping[str, TensorInfo]:
        path = self._layer_path(index)
        # A layer that stays as it is has an empty file.
        return TensorFile(path).tensors

    def _take_over(self) -> None:
        """Go on with what is there and proven; else from the beginning."""
        path = self._directory / _JOURNAL
        try:
            found = json.loads(path.read_bytes())
            layers, hidden, identity = (found[key] for key in ("layers", "hidden", "identity"))
            if not isinstance(layers, list) or not isinstance(identity, dict):
                return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        if (differs := difference(identity, self._document["identity"])) is not None:
            raise RefusedDirectoryError(
                f"{self._directory} is the beginning of another calibration: {differs}",
                hint="give the same model and options, or remove that directory yourself",
            )
        expected = [(self._layer_path(i), digest) for i, digest in enumerate(layers)]
        expected.append((self._hidden_path(len(layers)), hidden))
        if all(_is_proven(file, digest) for file, digest in expected):
            self._document = found

    def _store_hidden(self, index: int, shape: tuple[int, ...], batches: Iterable[Tensor]) -> str:
        header = encode_header([(_HIDDEN, "F32", shape, 4 * prod(shape))])
        # Not worth a wait for the disk: what is lost in a power failure is computed again.
        return self._store(self._hidden_path(index), header, batches, durable=False)

    def _store(self, path: Path, header: bytes, data: Iterable[Tensor], *, durable: bool) -> str:
        partial = path.with_name(f"{path.name}.partial")
        digest = xxhash.xxh3_128(header)
        with self._errors(path), open(partial, "wb") as file:
            file.write(header)
            for tensor in data:
                flat = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                digest.update(flat)
                file.write(flat)
            if durable:
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        return digest.hexdigest()

    def _note(self) -> None:
        path = self._directory / _JOURNAL
        partial = path.with_name(f"{path.name}.partial")
        with self._errors(path):
            with open(partial, "w") as file:
                json.dump(self._document, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_directory(self._directory)

    def _layer_path(self, index: int) -> Path:
        return self._directory / f"layer-{index:05}.safetensors"

    def _hidden_path(self, layers: int) -> Path:
        return self._directory / f"{_HIDDEN}-{layers:05}.safetensors"

    @contextmanager
    def _errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise output_error(
                error, path, 0, left="the layers that are done stay, for --resume"
            ) from error


def has_begun(directory: Path) -> bool:
    """Whether a calibration has left something to go on with."""
    return (directory / _JOURNAL).is_file()


def _is_proven(path: Path, digest: Any) -> bool:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return checksum(file.fileno(), 0, size, lambda nbytes: None) == digest
    except OSError:
        return False
