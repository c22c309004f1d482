"""What attention over the paged KV cache takes on a GPU in the built-in runtime: a workspace.

Sequences that are decoded are split among programs until a GPU is full; what each of them finds is
kept until all have, in float32.
"""

from collections.abc import Iterator
from functools import lru_cache

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.cache import TokenCache
from tightfit.model.layout import Rank
from tightfit.model.parameters import stage_layers
from tightfit.model.spec import ModelSpec
from tightfit.units import cdiv

MAX_SPLITS = 128
"""Programs that share one sequence at most; what combines them holds a weight for each at once."""
MAX_ROWS = 64
"""Query heads that one program takes at most."""
MIN_SPLIT_KEYS = 64
"""A program has so many keys at least, where the longest sequence allows."""
_PROGRAMS = {64: 528, 128: 396, 256: 396, 1024: 264}
"""By the features of a head at most: how many programs fill a GPU. These are what an H100's 132
multiprocessors run at once; other GPUs get as many, so that the workspace can be planned."""


def workspace_formula(
    spec: ModelSpec, rank: Rank, max_num_seqs: int, max_model_len: int
) -> tuple[int, str]:
    """Bytes of the workspace that all layers share, and the term of a formula."""
    elements = max(
        (
            workspace_elements(max_num_seqs, *shape, max_model_len)
            for shape in set(_shapes(spec, rank))
        ),
        default=0,
    )
    return 4 * elements, f" + attention of split sequences: {elements} x 4"


def _shapes(spec: ModelSpec, rank: Rank) -> Iterator[tuple[int, int, int, int]]:
    """Heads, KV heads, and the features of a key and of a value, of every layer on a rank."""
    for i in stage_layers(spec, rank):
        for mixer in spec.layers[i].mixers:
            if not isinstance(mixer, Attention | LatentAttention):
                continue
            for cache in mixer.caches(rank)[:1]:
                assert isinstance(cache, TokenCache)
                if isinstance(mixer, Attention):
                    heads = head_axes(mixer)[0].span(rank)[1] // mixer.head_dim
                    value_dim = cache.value_size
                else:
                    heads = mixer.heads(1).span(rank)[1]
                    value_dim = mixer.kv_lora_rank if mixer.absorbed else cache.value_size
                yield heads, cache.slots, cache.key_size, value_dim


def num_splits(sequences: int, heads: int, kv_heads: int, head_dim: int, max_length: int) -> int:
    """Programs that share one sequence of a decode.

    It depends on nothing that changes between replays of a CUDA graph: `sequences` is padded, and
    `max_length` is what a sequence may grow to.
    """
    programs = _PROGRAMS[class_of(head_dim)]
    tiles = cdiv(heads // kv_heads, MAX_ROWS)
    wanted = programs // (sequences * kv_heads * tiles)
    return max(1, min(wanted, max_length // MIN_SPLIT_KEYS, MAX_SPLITS))


@lru_cache(maxsize=256)
def workspace_elements(
    max_num_seqs: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, max_length: int
) -> int:
    """Float32 elements that decodes of up to `max_num_seqs` sequences need for split sequences.

    Each split leaves the output of each query head, and the logarithm of its weight. More sequences
    than half of the programs are not split.
    """
    most = min(max_num_seqs, _PROGRAMS[class_of(head_dim)] // 2)
    rows = max(
        (
            sequences * splits
            for sequences in range(1, most + 1)
            if (splits := num_splits(sequences, heads, kv_heads, head_dim, max_length)) > 1
        ),
        default=0,
    )
    return rows * heads * (value_dim + 1)


def class_of(head_dim: int) -> int:
    """The class of kernels that a head belongs to: its features at most."""
    return next(size for size in _PROGRAMS if head_dim <= size)
