"""SGLang's names of parameters, for its `--load-format sharded_state`.

Its loader (`srt/model_loader/loader.py: ShardedStateLoader`) is vLLM's of old: the same file names,
padding and rule for tensors that share memory, and no constants beside attention layers. Names and
shapes are those of the model classes of 0.5.23, built without weights on one and two ranks. That
loader rearranges parameters before it fills them, so this holds only where kernels leave
unquantized weights as they are.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.names import FamilyNames, text_names

_DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_WITH_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")


def sglang_names(architecture: str) -> FamilyNames:
    """The names of a family.

    Raises:
        UnsupportedModelError: nobody has listed them.
    """
    known = (*_DENSE, *_WITH_EXPERTS)
    if architecture not in known:
        raise UnsupportedModelError(
            f"SGLang's names of {architecture} are not known", hint="known are " + ", ".join(known)
        )
    names = text_names(architecture)
    plain = () if architecture in _WITH_EXPERTS else names.renamed
    return replace(names, renamed=plain, attention=())


def check_sglang(spec: ModelSpec) -> None:
    """Refuse variants of known families that SGLang builds otherwise.

    Raises:
        UnsupportedModelError: its classes have no such biases, or experts in every layer.
    """
    weights = parameters(spec)
    sparse = {weight.where for weight in weights if weight.experts}
    if any(weight.name.endswith(".mlp.gate_up_proj.bias") for weight in weights):
        raise UnsupportedModelError(
            f"SGLang's {spec.architecture} has no biases in its MLPs", hint="serve it with vLLM"
        )
    if sparse and len(sparse) < spec.num_layers:
        raise UnsupportedModelError(
            f"SGLang's {spec.architecture} has experts in every layer, and this model has not",
            hint="serve it with vLLM",
        )
