"""Any decoder that transformers knows, by its own modelling code: the second kind of model.

transformers builds and loads the module; its attention is registered under a name of our own, so
that queries, keys and values of every layer reach this runtime's paged cache. All sequences of a
step are one row of tokens, [1, tokens], with their positions and without a mask. Code that comes
with a checkpoint is never executed.

Loading is `hf_loading`'s, and what attention the code computes `hf_probe` finds out.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.model.spec import ModelSpec
from tightfit.runtime.attention.base import Attend, AttentionLayer
from tightfit.runtime.models.hf_probe import Probe, layer_of, refused
from tightfit.runtime.sampling import Vocabulary
from tightfit.runtime.states import Recurrence

_numbers = count()


class TransformersModel:
    """A whole model on one device, in the place of `models.decoder.Decoder`.

    Raises:
        UnsupportedModelError: its attention is not that of the plan, or not causal (`hf_probe`).
    """

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        self.spec = spec
        self.implementation = f"transformers' {type(model).__name__}"
        self._model = model
        self._decoder: nn.Module
        self._attend: Attend | None = None
        self._output: Any = None
        self.layers, self._decoder = _probed(spec, model)
        name = _register(self._attention)
        model.set_attn_implementation(name)

    @property
    def vocabulary(self) -> Vocabulary:
        """One rank has it all."""
        return Vocabulary(size=self.spec.vocab_size, widths=[self.spec.vocab_size])

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, those on the host too."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        recurrence: Recurrence | None = None,
    ) -> Tensor:
        """What the last norm gives: int64 [tokens] -> [tokens, hidden]."""
        assert recurrence is None
        self._attend = attend
        self._output = self._decoder(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False
        )
        hidden: Tensor = self._output.last_hidden_state
        self._output.last_hidden_state = None
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary: [rows, hidden] -> float32 [rows, vocab_size].

        The model's own forward makes them of the hidden states, which it takes for those of its
        decoder: scaling and capping of logits are in there.
        """
        output = self._output
        output.last_hidden_state = hidden[None]
        forward = self._decoder.forward
        self._decoder.forward = lambda *_, **__: output
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._decoder.forward = forward
            output.last_hidden_state = None
        return logits[0, :, : self.spec.vocab_size].float()

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Queries [1, heads, tokens, head_dim], keys and values -> [1, tokens, heads, head_dim]."""
        assert self._attend is not None
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        return self._attend(layer_of(module), q, k, v).view(1, *q.shape), None


@torch.inference_mode()
def _probed(spec: ModelSpec, model: Any) -> tuple[tuple[AttentionLayer, ...], nn.Module]:
    """What one token shows: how layers attend, and which module the head takes its input from."""
    probe = Probe(spec)
    model.set_attn_implementation(_register(probe.attention, probe.mask))
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.append(module))
        for module in {model.base_model, model.get_decoder()}
    ]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model(input_ids=zero, position_ids=zero, use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # Code that expects more of attention than its interface says.
        raise refused(spec, f"one token makes it fail ({str(error)[:120]})") from error
    for hook in hooks:
        hook.remove()
    return probe.attentions(), called[0]


def _register(attention: Callable[..., Any], mask: Callable[..., Any] | None = None) -> str:
    """A new name for attention, under which transformers finds it; without masks none are made."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"tightfit_{next(_numbers)}"
    AttentionInterface.register(name, attention)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    return name
