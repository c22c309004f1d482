"""The encoder of a multimodal model in the profile run: its largest batch, and what it gives."""

from tightfit.planner.engines.vllm_setting import Setting
from tightfit.planner.plan import Component


def encoder(setting: Setting, step_peak_bytes: int) -> list[Component]:
    """`vision_encoder` and `encoder_cache`, where a tower is built and profiled.

    The outputs stay while the decoder is profiled; the run itself is over by then, so that only
    what it takes beyond the decoder's peak is added. The V2 runner ran no encoder before 0.27.

    Args:
        setting: of the rank.
        step_peak_bytes: the decoder's peak.
    """
    spec = setting.spec
    profiled = setting.runner == "v1" or setting.rules.v2_profiles_encoder
    if not spec.towers or not setting.first_stage or not profiled:
        return []
    from tightfit.planner.engines.vllm_media import encoder_cache, encoder_profile, encoder_run

    profile = encoder_profile(
        spec,
        setting.options,
        max_model_len=setting.max_model_len,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_num_seqs=setting.max_num_seqs,
    )
    if profile is None:
        return []
    outputs = encoder_cache(profile, setting.element_bytes)
    run = encoder_run(profile, setting.options, setting.element_bytes, setting.tensor_parallel_size)
    return [
        Component(
            name="vision_encoder",
            planned_bytes=max(0, run.nbytes - step_peak_bytes - outputs.nbytes),
            origin="derived",
            formula=f"{run.formula}: {run.nbytes}, less the peak of the decoder, which comes after "
            f"it, and its outputs: {step_peak_bytes} + {outputs.nbytes}",
            detail={"alone_bytes": run.nbytes, "resident_bytes": 0},
        ),
        Component(
            name="encoder_cache",
            planned_bytes=outputs.nbytes,
            origin="derived",
            formula=outputs.formula,
            detail={"resident_bytes": 0},
        ),
    ]
