"""Plan a model wherever its checkpoint is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import Description, describe
from tightfit.model.listed import assumed
from tightfit.model.spec import ModelSpec
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.quantized import stored_bytes, wish_of

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A checkpoint that was read once and can be planned many times."""

    checkpoint: Checkpoint
    spec: ModelSpec
    from_headers: bool
    tokenizer_json_bytes: int = 0
    _sizes: dict[object, int] = field(default_factory=dict, init=False, repr=False)
    _others: dict[str, ModelSpec] = field(default_factory=dict, init=False, repr=False)

    def plan(self, options: PlanOptions, *, corrected: bool = True) -> Plan:
        """Plan it with these options.

        Args:
            options: of the plan.
            corrected: by what the user's own start-ups have taught (`user_calibration`).

        Raises:
            TightfitError: see `make_plan`.
        """
        if self.tokenizer_json_bytes:
            options = replace(options, tokenizer_json_bytes=self.tokenizer_json_bytes)
        spec = assumed(
            self.spec_of(options),
            full_attention=options.assume_full_attention,
            ranks=options.tensor_parallel_size,
            stages=options.pipeline_parallel_size,
        )
        return make_plan(
            spec,
            options,
            name=self.checkpoint.name,
            checkpoint_bytes=self._stored_bytes(options) if self.from_headers else None,
            measured=_own_measurements(spec, options) if corrected else None,
        )

    def spec_of(self, options: PlanOptions) -> ModelSpec:
        """The model, with the config that the options make of its own.

        Raises:
            TightfitError: see `describe`.
        """
        if not options.hf_overrides:
            return self.spec
        key = json.dumps(options.hf_overrides, sort_keys=True, default=repr)
        if key not in self._others:
            self._others[key] = _described(self.checkpoint, options.hf_overrides).spec
        return self._others[key]

    def _stored_bytes(self, options: PlanOptions) -> int:
        """Of the checkpoint that is planned; a sweep asks for it again and again."""
        wish = wish_of(options)
        if wish not in self._sizes:
            self._sizes[wish] = stored_bytes(self.spec, options, self.checkpoint.tensors())
        return self._sizes[wish]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made from."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan


def _own_measurements(spec: ModelSpec, options: PlanOptions) -> Mapping[str, int]:
    """Reads nothing where the user has no such file."""
    if options.engine != "vllm" or options.device is None:
        return {}
    from tightfit.planner.engines.vllm_versions import rules_of
    from tightfit.planner.user_calibration import adjustments

    learnt = adjustments(
        options.engine,
        options.engine_version or rules_of(None).version,
        options.device.name,
        spec.architecture,
        options.tensor_parallel_size,
    )
    # What depends on batch and capture sizes may be taken up, but never down, from another start.
    return {name: n for name, n in learnt.items() if n > 0 or name == "non_torch"}


def _described(
    checkpoint: Checkpoint, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Description:
    """The model with its processor's sizes, and what there is to be said of it."""
    description = describe(checkpoint, overrides)
    spec = description.spec
    if spec.towers:
        from tightfit.checkpoint.processor import with_processor

        spec = with_processor(spec, checkpoint.source)
    return replace(description, spec=replace(spec, notes=(*spec.notes, *description.warnings)))


def open_model(
    model: str,
    *,
    revision: str | None = None,
    download: bool = False,
    with_text: bool = True,
) -> OpenedModel:
    """Open a checkpoint, and check its headers if it has weights.

    Args:
        model: anything that `open_checkpoint` takes.
        revision: of a Hub id.
        download: fetch the weights of a Hub id.
        with_text: whether the engine will load the tokenizer.

    Raises:
        TightfitError: see `open_checkpoint` and `describe`.
    """
    checkpoint = open_checkpoint(model, revision=revision, download=download)
    description = _described(checkpoint)
    text = with_text and checkpoint.source.exists(_TOKENIZER)
    return OpenedModel(
        checkpoint=checkpoint,
        spec=description.spec,
        from_headers=description.from_headers,
        tokenizer_json_bytes=checkpoint.source.size(_TOKENIZER) if text else 0,
    )


def plan_model(
    model: str,
    options: PlanOptions,
    *,
    revision: str | None = None,
    download: bool = False,
    with_text: bool = True,
) -> Planned:
    """Open a checkpoint and plan it: `open_model` and `OpenedModel.plan` in one.

    Raises:
        TightfitError: see there.
    """
    opened = open_model(model, revision=revision, download=download, with_text=with_text)
    return Planned(checkpoint=opened.checkpoint, spec=opened.spec, plan=opened.plan(options))
