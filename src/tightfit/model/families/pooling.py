"""Models that make embeddings or scores: a decoder without its head, and maybe a matrix of scores.

vLLM converts any decoder whose name says so (`config/model.py: _SUFFIX_TO_DEFAULTS`,
`models/adapters.py`): `Qwen2Model` embeds, `Qwen3ForSequenceClassification` scores with a matrix
that it computes in float32.
"""

from collections.abc import Container
from dataclasses import replace

from tightfit.model.config import Config
from tightfit.model.layout import Part, Stage, Weight
from tightfit.model.spec import ModelSpec

_SCORES = "ForSequenceClassification"
_SUFFIXES = ("ForTextEncoding", "EmbeddingModel", _SCORES, "TextModel", "Model")
_GENERATIVE = ("ForCausalLM", "LMHeadModel")


def pooled_base(architecture: str, known: Container[str]) -> str | None:
    """The generating model that a pooling one is made from, if it is among the known."""
    for suffix in _SUFFIXES:
        if architecture.endswith(suffix):
            stem = architecture.removesuffix(suffix)
            return next((stem + s for s in _GENERATIVE if stem + s in known), None)
    return None


def as_pooling(spec: ModelSpec, config: Config, architecture: str) -> ModelSpec:
    """The decoder without a head, with a matrix of scores if its name says that it classifies."""
    scores: tuple[Weight, ...] = ()
    if architecture.endswith(_SCORES):
        labels = len(config.raw("id2label", default=())) or 2
        part = Part(source="score.weight", rows=config.integer("num_labels", default=labels))
        scores = (
            Weight(
                name="score.weight",
                parts=(part,),
                columns=spec.hidden_size,
                where=Stage.LAST,
                engine_dtype="F32",
            ),
        )
    return pooling(replace(spec, extras=(*spec.extras, *scores)))


def pooling(spec: ModelSpec) -> ModelSpec:
    """The model without its head, which its checkpoint may have nevertheless."""
    return replace(
        spec,
        pooling=True,
        ignored_sources=(*spec.ignored_sources, r"^lm_head\."),
        verified_for_sharding=False,
    )
