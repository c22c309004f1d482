"""Rank files of families beyond plain decoders, against slices that torch makes of the sources.

Names, shapes and tokens are held against vLLM itself in `tests/vllm`; here every byte of the odd
cuts is: stacked, transposed and interleaved sources, and computed decay rates.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.slicing import Tensors, read_rank
from support.tiny_families import SHARDED, UNSHARDED
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.cli.output import NoProgress
from tightfit.errors import UnsupportedModelError
from tightfit.model.layout import Piece
from tightfit.sharding.copies import copies
from tightfit.sharding.decay import decay_rates
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.shard import prepare

TinyModel = Callable[[str], Path]


def shards(model: Path, out: Path, size: int) -> tuple[Tensors, list[Tensors]]:
    """The source, and what is in the files of each rank."""
    write_shards(model, out, size)
    report = verify(
        out, open_checkpoint(str(out)).config, NoProgress(), open_checkpoint(str(model))
    )
    assert report.problems == ()
    return load_file(model / "model.safetensors"), [read_rank(out, rank) for rank in range(size)]


@pytest.mark.parametrize("name", SHARDED)
def test_verifies(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    _, ranks = shards(tiny_model(name), tmp_path / "out", 2)
    assert ranks[0].keys() == ranks[1].keys()


@pytest.mark.parametrize("name", UNSHARDED)
def test_refused(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(tiny_model(name), tmp_path / "out", 1)
    assert "vLLM's names of its parameters have not been verified" in e.value.message
    assert not (tmp_path / "out").exists()


def test_transposed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """GPT-2 stores `[in, out]`."""
    source, ranks = shards(tiny_model("gpt2"), tmp_path / "out", 2)
    at = "transformer.h.1."
    q, k, v = source[f"{at}attn.c_attn.weight"].T.split(128)
    for rank, found in enumerate(ranks):
        half = slice(64 * rank, 64 * rank + 64)
        expected = torch.cat([q[half], k[half], v[half]])
        assert torch.equal(found[f"{at}attn.c_attn.weight"], expected)
        down = source[f"{at}mlp.c_proj.weight"].T
        assert torch.equal(found[f"{at}mlp.c_proj.weight"], down.chunk(2, dim=1)[rank])
        assert torch.equal(found["transformer.wpe.weight"], source["transformer.wpe.weight"])
        assert "transformer.wte.weight" not in found
        rows = found["lm_head.weight"]
        table = torch.zeros(320, 128, dtype=rows.dtype)
        table[:259] = source["transformer.wte.weight"]
        assert torch.equal(rows, table[160 * rank : 160 * rank + 160])


def test_stacked_transposed_and_alternating(tiny_model: TinyModel, tmp_path: Path) -> None:
    """gpt-oss: pairs of gate and up stay together, and biases of experts go with them."""
    source, ranks = shards(tiny_model("gpt_oss"), tmp_path / "out", 2)
    old, new = "model.layers.1.mlp.experts.", "model.layers.1.mlp.experts.routed_experts."
    for rank, found in enumerate(ranks):
        gate_up = source[f"{old}gate_up_proj"].transpose(1, 2).chunk(2, dim=1)[rank]
        assert torch.equal(found[f"{new}w13_weight"], gate_up)
        down = source[f"{old}down_proj"].transpose(1, 2).chunk(2, dim=2)[rank]
        assert torch.equal(found[f"{new}w2_weight"], down)
        bias = source[f"{old}gate_up_proj_bias"].chunk(2, dim=1)[rank]
        assert torch.equal(found[f"{new}w13_bias"], bias)
        # The first rank adds it to the sum of all.
        assert torch.equal(found[f"{new}w2_bias"], source[f"{old}down_proj_bias"] * (rank == 0))
        sinks = source["model.layers.1.self_attn.sinks"].chunk(2)[rank]
        assert torch.equal(found["model.layers.1.attn.sinks"], sinks)


@pytest.mark.parametrize("name", ["llama4", "granitemoe"])
def test_stacked_gate_and_up(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, ranks = shards(tiny_model(name), tmp_path / "out", 2)
    if name == "llama4":
        module = "model.layers.1.feed_forward.experts."
        gate_up = source[f"{module}gate_up_proj"].transpose(1, 2)
        down = source[f"{module}down_proj"].transpose(1, 2)
        routed = f"{module}routed_experts."
    else:
        module = "model.layers.1.block_sparse_moe."
        gate_up = source[f"{module}input_linear.weight"]
        down = source[f"{module}output_linear.weight"]
        routed = f"{module}experts.routed_experts."
    gate, up = gate_up.chunk(2, dim=1)
    for rank, found in enumerate(ranks):
        expected = torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
        assert torch.equal(found[f"{routed}w13_weight"], expected)
        assert torch.equal(found[f"{routed}w2_weight"], down.chunk(2, dim=2)[rank])


def test_pairs_of_features(tiny_model: TinyModel, tmp_path: Path) -> None:
    """vLLM holds the even features of Llama 4's queries and keys before the odd ones."""
    source, ranks = shards(tiny_model("llama4"), tmp_path / "out", 2)
    at = "model.layers.3.self_attn."
    q, k = (
        source[f"{at}{name}_proj.weight"].view(heads, 16, 2, 128).transpose(1, 2).reshape(-1, 128)
        for name, heads in (("q", 4), ("k", 2))
    )
    members = (q, k, source[f"{at}v_proj.weight"])
    for rank, found in enumerate(ranks):
        expected = torch.cat([member.chunk(2)[rank] for member in members])
        assert torch.equal(found[f"{at}qkv_proj.weight"], expected)


@pytest.mark.parametrize(("name", "kv_heads"), [("falcon", 2), ("falcon_7b", 1), ("falcon_rw", 4)])
def test_interleaved(name: str, kv_heads: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Falcon stores the query heads, key and value of one KV head after the other."""
    source, ranks = shards(tiny_model(name), tmp_path / "out", 2)
    at = "transformer.h.1.self_attention.query_key_value.weight"
    groups = source[at].view(kv_heads, 4 // kv_heads + 2, 32, 128)
    q = groups[:, :-2].reshape(4 * 32, 128)
    k, v = (groups[:, i].reshape(kv_heads * 32, 128) for i in (-2, -1))
    for rank, found in enumerate(ranks):
        rows = kv_heads * 32 // 2 if kv_heads > 1 else 32
        own = slice(rank * rows, rank * rows + rows) if kv_heads > 1 else slice(0, 32)
        expected = torch.cat([q[64 * rank : 64 * rank + 64], k[own], v[own]])
        assert torch.equal(found[at], expected)


def test_convolutions_and_decay_rates(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Mamba 2 is cut in each of x, B and C; `A` is computed in float32."""
    source, ranks = shards(tiny_model("mamba2"), tmp_path / "out", 2)
    at = "backbone.layers.1.mixer."
    members = source[f"{at}conv1d.weight"].split([256, 64, 64])
    for rank, found in enumerate(ranks):
        expected = torch.cat([member.chunk(2)[rank] for member in members])
        assert torch.equal(found[f"{at}conv1d.weight"], expected)
        rates = -torch.exp(source[f"{at}A_log"].double()).float().chunk(2)[rank]
        assert found[f"{at}A"].dtype == torch.float32
        assert torch.equal(found[f"{at}A"], rates)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
def test_decay_rates(dtype: torch.dtype, name: str) -> None:
    values = torch.cat([torch.linspace(-20, 20, 501), torch.tensor([0.0, -1e4, 3e4])]).to(dtype)
    data = values.view(torch.uint8).numpy().tobytes()
    found = torch.frombuffer(bytearray(decay_rates(data, name)), dtype=torch.float32)
    assert torch.equal(found, -torch.exp(values.double()).float())


def test_pipeline_stages(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every stage has its layers, in files that vLLM finds by stage and rank."""
    model = tiny_model("llama_tied")
    manifest = write_shards(model, tmp_path / "out", 2, pipeline_parallel_size=2)
    assert (manifest.tensor_parallel_size, manifest.pipeline_parallel_size) == (2, 2)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-pp-{pp}-tp-{tp}-part-0.safetensors" for pp in (0, 1) for tp in (0, 1)]
    config = open_checkpoint(str(tmp_path / "out")).config
    report = verify(tmp_path / "out", config, NoProgress(), open_checkpoint(str(model)))
    assert report.problems == ()
    write_shards(model, tmp_path / "whole", 2)
    for tp in (0, 1):
        whole = read_rank(tmp_path / "whole", tp)
        stages = [
            load_file(tmp_path / "out" / f"model-pp-{pp}-tp-{tp}-part-0.safetensors")
            for pp in (0, 1)
        ]
        assert stages[0].keys() & stages[1].keys() == set()
        # The first stage has the table as embedding, the last one as head.
        table = stages[0].pop("model.embed_tokens.weight")
        assert torch.equal(table, stages[1]["lm_head.weight"])
        both = stages[0] | stages[1]
        assert both.keys() == whole.keys()
        assert all(torch.equal(both[name], whole[name]) for name in whole)


def boxes() -> list[tuple[tuple[int, ...], Piece, tuple[int, ...]]]:
    """(source shape, piece, target shape) of every kind of box."""

    def case(
        source: tuple[int, ...],
        start: tuple[int, ...],
        shape: tuple[int, ...],
        at: tuple[int, ...],
        target: tuple[int, ...],
        transposed: bool = False,
    ) -> tuple[tuple[int, ...], Piece, tuple[int, ...]]:
        piece = Piece(
            source="x", source_shape=source, start=start, shape=shape, at=at, transposed=transposed
        )
        return source, piece, target

    return [
        case((9,), (2,), (5,), (1,), (7,)),
        case((6, 8), (2, 0), (3, 8), (1, 0), (5, 8)),
        case((6, 8), (1, 2), (4, 3), (1, 0), (6, 3)),
        case((6, 8), (1, 2), (4, 3), (1, 2), (6, 7)),
        case((6, 8), (1, 7), (4, 1), (0, 0), (4, 1)),
        case((6, 8), (2, 0), (3, 8), (2, 1, 0), (4, 5, 8)),
        case((4, 6, 8), (1, 0, 0), (2, 6, 8), (0, 0, 0), (2, 6, 8)),
        case((4, 6, 8), (1, 2, 0), (2, 3, 8), (0, 1, 0), (2, 5, 8)),
        case((4, 6, 8), (1, 2, 4), (3, 3, 2), (0, 1, 0), (3, 5, 2)),
        case((6, 8), (1, 2), (4, 3), (1, 0), (6, 4), True),
        case((6, 8), (1, 2), (4, 3), (1, 1), (6, 7), True),
        case((6, 8), (1, 2), (1, 3), (1, 1), (6, 7), True),
        case((6, 8), (1, 2), (4, 1), (1, 1), (6, 7), True),
        case((4, 6, 8), (1, 2, 0), (2, 3, 8), (0, 0, 1), (2, 8, 5), True),
        case((6, 8), (3, 0), (3, 8), (1, 0, 0), (2, 8, 3), True),
        case((5, 1, 4), (1, 0, 0), (3, 1, 4), (2, 0, 0), (6, 1, 4)),
    ]


@pytest.mark.parametrize("buffer", [1, 40, 2**20])
@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32", "I64"])
def test_every_kind_of_box(buffer: int, dtype: str, tmp_path: Path) -> None:
    """What the planned copies write is what torch's own narrowing, transposing and copying give."""
    kinds = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    for number, (shape, piece, target_shape) in enumerate(boxes()):
        count = torch.Size(shape).numel()
        source = torch.arange(1, count + 1).reshape(shape).to(kinds[dtype])
        expected = torch.zeros(target_shape, dtype=kinds[dtype])
        box, place = source, expected
        for dim, (first, size) in enumerate(zip(piece.start, piece.shape, strict=True)):
            box = box.narrow(dim, first, size)
        box = box.transpose(-1, -2) if piece.transposed else box
        box = box.reshape((1,) * (len(target_shape) - box.dim()) + tuple(box.shape))
        for dim, (first, size) in enumerate(zip(piece.at, box.shape, strict=True)):
            place = place.narrow(dim, first, size)
        place.copy_(box)
        assert written(source, piece, expected, dtype, tmp_path / str(number), buffer), piece


class Into:
    """Writes to one file, and remembers how much."""

    def __init__(self, fd: int, done: list[int]) -> None:
        self.fd, self.done = fd, done

    def put(self, target: int, offset: int, data: memoryview, *, aligned: bool) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)
        self.done.append(len(data))

    def put_lines(
        self, target: int, offset: int, stride: int, data: memoryview, nbytes: int
    ) -> None:
        for i in range(len(data) // nbytes):
            line = data[i * nbytes : (i + 1) * nbytes]
            self.put(target, offset + i * stride, line, aligned=False)


def written(
    source: torch.Tensor,
    piece: Piece,
    expected: torch.Tensor,
    dtype: str,
    directory: Path,
    buffer: int,
) -> bool:
    """Whether the copies of a piece give `expected`; the files begin with a few other bytes."""
    from tightfit.checkpoint.source import LocalSource
    from tightfit.sharding.copies import Copy, TensorCopies, Turn
    from tightfit.sharding.stream.carry import Carrier
    from tightfit.sharding.stream.source_files import SourceFiles

    directory.mkdir()
    data = source.contiguous().view(torch.uint8).numpy().tobytes()
    (directory / "source").write_bytes(b"abcd" + data)
    wanted = b"12" + expected.contiguous().view(torch.uint8).numpy().tobytes()
    info = TensorInfo(
        name="x", dtype=dtype, shape=piece.source_shape, file="source", offset=4, nbytes=len(data)
    )
    planned = list(copies(piece, info, tuple(expected.shape), target=0, target_offset=2))
    group = TensorCopies(
        source=info,
        copies=tuple(one for one in planned if isinstance(one, Copy)),
        turns=tuple(one for one in planned if isinstance(one, Turn)),
    )
    target = directory / "target"
    target.write_bytes(b"12" + bytes(len(wanted) - 2))
    done: list[int] = []
    with SourceFiles(LocalSource(directory)) as files, open(target, "r+b") as file:
        Carrier(files, Into(file.fileno(), done), buffer).carry(group)
    assert sum(done) == group.nbytes == piece_bytes(piece, source)
    return target.read_bytes() == wanted


def piece_bytes(piece: Piece, source: torch.Tensor) -> int:
    return torch.Size(piece.shape).numel() * source.element_size()


def test_a_matrix_is_turned_in_bounded_memory(tiny_model: TinyModel) -> None:
    """Every expert is a read of its own, and large ones are read in blocks."""
    from tightfit.model.stored import stored_layout

    job = prepare(
        open_checkpoint(str(tiny_model("gpt_oss"))),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=10**9,
    )
    (group,) = (g for g in job.copies if g.source.name == "model.layers.0.mlp.experts.down_proj")
    assert len(group.turns) == 2 * 4
    assert not group.copies
