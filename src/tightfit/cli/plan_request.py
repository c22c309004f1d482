"""What `plan` is asked: flags, over what a command, a YAML file or a log of vLLM says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.errors import UsageError

if TYPE_CHECKING:
    from tightfit.planner.vllm_command import ParsedCommand
    from tightfit.planner.vllm_log import VLLMLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The model and the options that were given, by name; flags win over everything else."""

    model: str
    asked: Mapping[str, Any]
    revision: str | None = None
    warnings: tuple[str, ...] = ()
    log: "VLLMLog | None" = None


def read_request(
    model: str | None,
    asked: Mapping[str, Any],
    *,
    revision: str | None = None,
    from_command: str | None = None,
    config: Path | None = None,
    from_log: Path | None = None,
) -> Request:
    """Join the sources: a command wins over a YAML file, and that over a log.

    Raises:
        UsageError: no model, or a command that cannot be read.
        ConfigError: a YAML file or a log that cannot be read.
    """
    flags = {name: value for name, value in asked.items() if value is not None}
    parsed: list[ParsedCommand] = []
    if config is not None:
        from tightfit.planner.vllm_command import parse_config_file

        parsed.append(parse_config_file(config, flags.get("engine_version")))
    if from_command is not None:
        from tightfit.planner.vllm_command import parse_command

        parsed.append(parse_command(from_command, flags.get("engine_version")))
    options: dict[str, Any] = {}
    log = None
    if from_log is not None:
        from tightfit.cli.log_view import asked_by
        from tightfit.planner.vllm_log import read_log

        log = read_log(from_log)
        options, model = asked_by(log), model or log.model
    for one in parsed:
        options |= {"entrypoint": one.entrypoint, **one.options}
        model = model or one.model
        revision = revision or one.revision
    if model is None and from_command is not None:
        raise UsageError(
            f"no model in --from-command {from_command!r}",
            hint='write it as "vllm serve MODEL --max-model-len 8192", or give MODEL too',
        )
    if model is None:
        raise UsageError(
            "no MODEL given", hint="a directory, a config.json, a Hub id, or a URL: plan --help"
        )
    if flags.keys() & {"gpu", "gpu_memory"}:
        options = {name: one for name, one in options.items() if name not in ("gpu", "gpu_memory")}
    return Request(
        model=model,
        log=log,
        asked=options | flags,
        revision=revision,
        warnings=tuple(text for one in parsed for text in one.warnings),
    )


def with_recipe(
    asked: Mapping[str, Any], recipe: Path | None, ignore: Sequence[str]
) -> dict[str, Any]:
    """What is asked, with all that is said of `quantize` in one recipe.

    Raises:
        UsageError: there is nothing to ignore modules of, or a recipe that cannot be read or that
            the flags contradict.
    """
    found = dict(asked)
    if recipe is None and not ignore:
        return found
    scheme = found.pop("quantization", None)
    if recipe is None and scheme is None:
        raise UsageError(
            f"--quantization-ignore {ignore[0]!r} without a scheme",
            hint="--quantization w4a16, or --quantization-recipe FILE",
        )
    from tightfit.cli.quantize_request import FLAGS, wish_from

    flags = {key: flag.replace("--", "--quantization-") for key, flag in FLAGS.items()}
    found["quantization_recipe"] = wish_from(
        recipe,
        scheme=scheme,
        group_size=found.pop("quantization_group_size", None),
        file_format=found.pop("quantization_format", None),
        kv_cache=None,
        ignore=ignore,
        flags={**flags, "scheme": "--quantization"},
    )
    return found
