"""Which models the built-in runtime executes: all but those with a feature that is named here."""

from collections.abc import Iterator

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.parameters import layer_norms
from tightfit.model.spec import Layer, ModelSpec


def unexecuted(spec: ModelSpec) -> str | None:
    """The first feature of a model that the runtime has not, or None if it can execute it."""
    for feature in _of_model(spec):
        return feature
    for layer in dict.fromkeys(spec.layers):
        for feature in _of_layer(spec, layer):
            return feature
    return None


def _of_model(spec: ModelSpec) -> Iterator[str]:
    if spec.listed is not None:
        yield "an architecture of which only the parameters are known"
    if spec.alias is not None:
        yield f"the tensor {spec.alias}, which has another name than others of its kind"
    if spec.towers or spec.wraps_decoder:
        yield "encoders of images, video or audio"
    if spec.encoder_tokens:
        yield "an encoder"
    if spec.pooling:
        yield "pooling instead of an output layer"
    if spec.unmodelled is not None:
        yield spec.unmodelled
    if spec.embedding_size not in (None, spec.hidden_size):
        yield "an embedding of another width than the layers"
    if spec.whole_embedding or spec.added_embeddings:
        yield "an embedding unlike the output layer"
    for extra in spec.extras:
        if extra.name != spec.positions:
            yield f"{extra.name} beside the layers"


def _of_layer(spec: ModelSpec, layer: Layer) -> Iterator[str]:
    if len(layer.mixers) != 1:
        yield f"layers with {len(layer.mixers)} kinds of attention or state"
        return
    (mixer,) = layer.mixers
    if isinstance(mixer, Attention):
        yield from _of_attention(mixer)
    elif isinstance(mixer, Mamba2):
        if all(mixer.is_recurrent for other in spec.layers for mixer in other.mixers):
            yield "models without attention"
    elif not isinstance(mixer, LatentAttention):
        yield f"layers of {type(mixer).__name__}"
    elif mixer.index_topk is not None:
        yield "sparse attention"
    if layer.mlp is None:
        yield "layers without an MLP"
    if isinstance(layer.mlp, MoE):
        yield from _of_experts(layer.mlp)
    for extra in layer.extras:
        if not (isinstance(extra, DenseMLP) and isinstance(layer.mlp, MoE)):
            yield f"{type(extra).__name__} in layers"
    norms = len(layer_norms(spec, layer)) if spec.norm_weights else 2
    if layer.norms is not None or norms not in ((1, 2) if spec.parallel_residual else (2, 4)):
        yield f"layers with {norms} norms"


def _of_attention(attention: Attention) -> Iterator[str]:
    features = {
        "attention in chunks": attention.chunk is not None,
        "values of another size than keys": attention.v_dim != attention.head_dim,
        "gates of attention's output": attention.output_gate,
        "layers that read the cache of others": attention.shares_cache,
        "alibi": attention.alibi,
        "heads whose features are sorted": attention.split_pairs,
    }
    yield from (feature for feature, has_it in features.items() if has_it)


def _of_experts(moe: MoE) -> Iterator[str]:
    features = {
        "experts of another width than the layers": moe.latent_size is not None,
        "experts without a gate": not moe.gated,
        "experts as rows of one matrix": moe.names.flat,
    }
    yield from (feature for feature, has_it in features.items() if has_it)
