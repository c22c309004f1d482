"""What recurrent layers take in the built-in runtime: states, and the temporaries of a step.

T is `max_num_batched_tokens`, N is `max_num_seqs`, H the hidden size, b the bytes of an element;
the formulas are read off `runtime.models.mamba`, which imports the constants from here.
"""

from collections.abc import Mapping

from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.cache import State, StateCache
from tightfit.model.layout import Rank
from tightfit.model.parameters import stage_layers
from tightfit.model.spec import ModelSpec
from tightfit.units import cdiv

STATE_DTYPES: Mapping[str, str] = {"ssm": "F32"}
"""By role, whatever the model's; other states are of the dtype of computation."""
CHUNK_TOKENS = 128
"""Tokens among which a scan computes as attention does; between chunks it carries a state."""
SCAN_ELEMENTS = 2**23
"""Elements of the scores of the chunks that are scanned at once, unless one alone has more."""
STATE_ELEMENTS = 2**25
"""Elements of the states that are updated at once, unless one alone has more."""
GATE_ELEMENTS = 2**22
"""Elements that the gate and norm of a mixer's output convert to float32 at once."""


def state_rows(max_num_seqs: int) -> int:
    """Sequences whose states are held; one is for places of a CUDA graph without a sequence."""
    return max_num_seqs + 1


def state_bytes(spec: ModelSpec, rank: Rank, dtype: str) -> int:
    """Of one sequence on a rank that computes in `dtype`."""
    return sum(
        state.nbytes(STATE_DTYPES.get(state.role, dtype))
        for i in stage_layers(spec, rank)
        for mixer in spec.layers[i].mixers
        for cache in mixer.caches(rank)
        if isinstance(cache, StateCache)
        for state in cache.states
    )


def states_formula(spec: ModelSpec, rank: Rank, dtype: str, max_num_seqs: int) -> tuple[int, str]:
    """Bytes of all states, and the term of a formula; 0 and nothing where no layer has any."""
    each = state_bytes(spec, rank, dtype)
    if not each:
        return 0, ""
    rows = state_rows(max_num_seqs)
    return rows * each, f" + states of {max_num_seqs} sequences and 1 more: {rows} x {each}"


def mamba_stages(
    spec: ModelSpec, mamba: Mamba2, rank: Rank, b: int, tokens: int, seqs: int
) -> Mapping[str, int]:
    """Peaks within a Mamba 2 mixer; its input and what it projects live throughout."""
    conv, ssm = _states(mamba, rank)
    channels, (heads, head_dim, state) = conv.shape[-1], ssm.shape
    inner = heads * head_dim
    always = tokens * (spec.hidden_size + 2 * inner + channels + heads) * b
    longest = min(tokens, max(tokens - seqs + 1, CHUNK_TOKENS))
    square = CHUNK_TOKENS * CHUNK_TOKENS
    chunks = min(max(1, SCAN_ELEMENTS // (heads * square)), cdiv(longest, CHUNK_TOKENS))
    scanned = chunks * CHUNK_TOKENS
    groups = (channels - inner) // (2 * state)
    # x and y, and one of them laid out anew; then scores, or states of the chunks.
    inside = max(chunks * (heads + groups) * square, 3 * chunks * inner * state)
    small = scanned * (2 * (channels - inner) + 6 * heads) + inner * state
    scan = 4 * (3 * scanned * inner + inside + small + (scanned * channels if b < 4 else 0))
    updated = min(seqs, max(1, STATE_ELEMENTS // (inner * state)))
    rows = min(tokens, max(1, GATE_ELEMENTS // inner))
    return {
        "Mamba's convolution (3 x channels) x T x b": always + 3 * longest * channels * b,
        f"Mamba's scan of {scanned} tokens": always + longest * channels * b + scan,
        f"Mamba's update of {updated} states": always + 4 * updated * inner * state,
        f"Mamba's gate of {rows} rows": always + 4 * 4 * rows * inner,
        "Mamba's output projection": always + tokens * spec.hidden_size * b,
    }


def _states(mamba: Mamba2, rank: Rank) -> tuple[State, State]:
    (cache,) = mamba.caches(rank)
    assert isinstance(cache, StateCache)
    conv, ssm = cache.states
    return conv, ssm
