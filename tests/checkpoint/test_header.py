import json
import struct
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tightfit.checkpoint.header import encode_header, read_header
from tightfit.errors import CheckpointError
from tightfit.units import DTYPE_BITS


def parse(data: bytes, file="f.safetensors"):
    return read_header(file, len(data), lambda start, stop: data[start:stop])


def container(header, data_bytes=0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    arrays = {
        "a.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float32),
        "scalar": np.array(7, np.int64),
        "flag": np.array([True, False]),
        "ünïcode": np.arange(3, dtype=np.uint8),
    }
    path = tmp_path / "f.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    data = path.read_bytes()
    tensors = parse(data)
    assert tensors.keys() == arrays.keys()
    for name, info in tensors.items():
        assert info.shape == arrays[name].shape
        assert info.file == "f.safetensors"
        assert data[info.offset : info.offset + info.nbytes] == arrays[name].tobytes()
    assert {n: i.dtype for n, i in tensors.items()} == {
        "a.weight": "F16",
        "empty": "F32",
        "scalar": "I64",
        "flag": "BOOL",
        "ünïcode": "U8",
    }


def test_reads_torch_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    save_file({k: torch.zeros(2, 3, dtype=d) for k, d in dtypes.items()}, tmp_path / "f")
    tensors = parse((tmp_path / "f").read_bytes())
    assert {name: (i.dtype, i.nbytes) for name, i in tensors.items()} == {
        "BF16": ("BF16", 12),
        "F8_E4M3": ("F8_E4M3", 6),
        "F8_E5M2": ("F8_E5M2", 6),
    }


@pytest.mark.parametrize("align", [8, 4096])
def test_safetensors_reads_what_we_write(tmp_path, align):
    arrays = {"z": np.arange(10, dtype=np.int16), "a": np.eye(3, dtype=np.float64)}
    parts = [("z", "I16", (10,), 20), ("a", "F64", (3, 3), 72)]
    head = encode_header(parts, metadata={"format": "pt", "by": "tëst"}, align=align)
    assert len(head) % align == 0
    path = tmp_path / "f.safetensors"
    path.write_bytes(head + arrays["z"].tobytes() + arrays["a"].tobytes())
    with safetensors.safe_open(path, "np") as f:
        assert f.metadata() == {"format": "pt", "by": "tëst"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(f.get_tensor(name), array)
    assert [(i.name, i.offset) for i in parse(path.read_bytes()).values()] == [
        ("z", len(head)),
        ("a", len(head) + 20),
    ]


def test_an_empty_file_of_tensors_is_valid():
    assert parse(encode_header([])) == {}


BROKEN = {
    "empty": (b"", "f.safetensors has 0 bytes, and a safetensors file has at least 8"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "f.safetensors is a Git LFS pointer and not the weights themselves",
    ),
    "html": (
        b"<!DOCTYPE html><html></html>",
        "f.safetensors states a header of 5789751444030890300 bytes, and safetensors allows "
        "100000000; it is not a safetensors file",
    ),
    "cut in header": (
        container({"a": tensor()}, 8)[:40],
        "f.safetensors is truncated: its header ends at byte 69 of 40",
    ),
    "cut in data": (
        container({"a": tensor()}, 7),
        "f.safetensors: tensor 'a' ends at byte 8 of the data, and the file holds 7: "
        "it is truncated",
    ),
    "trailing bytes": (
        container({"a": tensor()}, 9),
        "f.safetensors has 78 bytes, and its tensors end at byte 77",
    ),
    "not utf-8": (
        container(b'{"\xff": 1}'),
        "f.safetensors: the header is not UTF-8 text (byte 10)",
    ),
    "not json": (
        container(b"{'a': 1}"),
        "f.safetensors: the header is not JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ),
    "not an object": (
        container([1, 2]),
        "f.safetensors: the header is not a JSON object but [1, 2]",
    ),
    "tensor twice": (
        container(b'{"a": {}, "a": {}}'),
        "f.safetensors: the header has 'a' twice",
    ),
    "key twice": (
        container(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        "f.safetensors: the header has 'dtype' twice",
    ),
    "entry incomplete": (
        container({"a": {"dtype": "F32"}}),
        "f.safetensors: tensor 'a' has no dtype, shape and data_offsets: {'dtype': 'F32'}",
    ),
    "entry not an object": (
        container({"a": 1}),
        "f.safetensors: tensor 'a' has no dtype, shape and data_offsets: 1",
    ),
    "dtype": (
        container({"a": tensor("F12")}, 8),
        "f.safetensors: tensor 'a' has the unknown dtype 'F12'",
    ),
    "dtype not text": (
        container({"a": tensor(["F32"])}, 8),
        "f.safetensors: tensor 'a' has the unknown dtype ['F32']",
    ),
    "negative shape": (
        container({"a": tensor(shape=(-2, -1))}, 8),
        "f.safetensors: tensor 'a' has the impossible shape [-2, -1]",
    ),
    "fractional shape": (
        container({"a": tensor(shape=(2.0,))}, 8),
        "f.safetensors: tensor 'a' has the impossible shape [2.0]",
    ),
    "boolean shape": (
        container({"a": tensor(shape=(True, 2))}, 8),
        "f.safetensors: tensor 'a' has the impossible shape [True, 2]",
    ),
    "three offsets": (
        container({"a": tensor(offsets=(0, 4, 8))}, 8),
        "f.safetensors: tensor 'a' has impossible data_offsets [0, 4, 8]",
    ),
    "offsets backwards": (
        container({"a": tensor(offsets=(8, 0))}, 8),
        "f.safetensors: tensor 'a' has impossible data_offsets [8, 0]",
    ),
    "shape and bytes": (
        container({"a": tensor(shape=(3,))}, 8),
        "f.safetensors: tensor 'a' of dtype F32 and shape [3] does not take the 8 bytes that its "
        "data_offsets [0, 8] give it",
    ),
    "half a byte": (
        container({"a": tensor("F4", (3,), (0, 2))}, 2),
        "f.safetensors: tensor 'a' of dtype F4 and shape [3] does not take the 2 bytes that its "
        "data_offsets [0, 2] give it",
    ),
    "absurd shape": (
        container({"a": tensor(shape=(2**63, 2**63))}, 8),
        "f.safetensors: tensor 'a' of dtype F32 and shape [9223372036854775808, "
        "9223372036854775808] does not take the 8 bytes that its data_offsets [0, 8] give it",
    ),
    "overlap": (
        container({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12),
        "f.safetensors: tensors 'a' and 'b' overlap at byte 135",
    ),
    "hole": (
        container({"a": tensor(), "b": tensor(offsets=(12, 20))}, 20),
        "f.safetensors: no tensor has the 4 bytes before 'b'",
    ),
    "metadata": (
        container({"__metadata__": {"a": 1}}),
        "f.safetensors: __metadata__ is not an object of strings: {'a': 1}",
    ),
    "half a surrogate pair": (
        container({"\ud800": tensor()}, 8),
        "f.safetensors: tensor '\\ud800' has a name that is not Unicode text",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case):
    data, message = BROKEN[case]
    with pytest.raises(CheckpointError) as e:
        parse(data)
    assert str(e.value) == message
    assert e.value.hint
    with pytest.raises(Exception, match=r"[Hh]eader|shape|[Ii]nvalid|offset|Offset|[Ii]ncomplete"):
        safetensors.deserialize(data)


def test_a_file_that_shrinks_while_it_is_read():
    with pytest.raises(CheckpointError, match="truncated: 3 of 8 header bytes"):
        read_header("f", 100, lambda start, stop: b"abc")


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(shape=[2**62] * 200_000)},
        {"a": tensor(shape=[1] * 1_000_000 + [7])},
        {"a": tensor(shape=[10**4000] * 500)},
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=["large", "long", "digits", "deep list", "deep object", "long number"],
)
def test_absurd_headers_are_refused_quickly(header):
    start = time.process_time()
    with pytest.raises(CheckpointError) as e:
        parse(container(header, 8))
    assert time.process_time() - start < 2
    assert len(str(e.value)) < 500


@given(st.binary(max_size=200))
def test_random_bytes_only_raise_checkpoint_errors(data):
    try:
        tensors = parse(data)
    except CheckpointError:
        return
    assert tensors == {}


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_mutated_headers_are_valid_or_refused(changes, cut):
    parts = [("a", "BF16", (2, 3), 12), ("b", "U8", (4,), 4)]
    data = bytearray(encode_header(parts, metadata={"k": "v"}, align=8) + bytes(16))
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: len(data) - cut]
    try:
        tensors = parse(bytes(data))
    except CheckpointError:
        return
    assert sum(info.nbytes for info in tensors.values()) == 16
    assert max((i.offset + i.nbytes for i in tensors.values()), default=len(data)) == len(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(sorted(DTYPE_BITS)) | json_values,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | json_values,
            }
        ),
        max_size=3,
    ),
    st.integers(0, 40),
)
def test_any_json_is_valid_or_refused(header, data_bytes):
    try:
        tensors = parse(container(header, data_bytes))
    except CheckpointError:
        return
    assert sum(info.nbytes for info in tensors.values()) == data_bytes


def test_the_writer_refuses_a_header_that_no_reader_accepts():
    names = [("n" * 10_000 + str(i), "U8", (1,), 1) for i in range(10_001)]
    with pytest.raises(CheckpointError, match="safetensors allows 100000000"):
        encode_header(names)
