"""A plan as something to run: a command, a docker compose file, or Kubernetes objects.

Only what the user asked for, or what was fitted, becomes a flag; the engine finds its own defaults
again, because the version is pinned. The pool of the plan is pinned as well (vLLM's
`--kv-cache-memory-bytes`), so that what is served is what was planned.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path, PurePath
from typing import Any, Literal

from tightfit.errors import DoesNotFitError, UsageError
from tightfit.model.quantization.written import COMPRESSED_TENSORS
from tightfit.planner.options import KV_DTYPES, Option, PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.quantized import wish_of
from tightfit.planner.vllm_arguments import before
from tightfit.planner.vllm_flags import MATTERS
from tightfit.units import TORCH_DTYPES, GiB, MiB, cdiv

Form = Literal["vllm", "compose", "k8s"]

PORT = 8000
_ELSEWHERE = {"tensor_parallel_size", "pipeline_parallel_size", "kv_cache_memory_bytes"}
_IMAGES = {"cuda": "vllm/vllm-openai", "rocm": "vllm/vllm-openai-rocm"}
_OLD_KEYS = {"mode": "level", "max_cudagraph_capture_size": "max_capture_size"}
"""Of a compilation config before 0.12."""
_CACHE = "/root/.cache/huggingface"
_START_SECONDS = 3600
"""A large checkpoint is downloaded and compiled before the server answers."""


def emit(
    plan: Plan,
    model: str,
    kind: Form,
    *,
    pin_kv_cache: bool = True,
    options: PlanOptions | None = None,
) -> str:
    """Write a plan as a command or a deployment of vLLM.

    Args:
        plan: for the engine `vllm`.
        model: as vLLM will be given it; a local directory becomes a volume in a deployment.
        kind: `vllm` (one shell command), `compose`, or `k8s` (a Deployment and a Service).
        pin_kv_cache: give the pool its planned size, in whole blocks, if a device was planned for.
        options: what the user asked for, where the plan does not repeat it.

    Raises:
        UsageError: the plan is for another engine, or has no such form.
        DoesNotFitError: it does not fit.
    """
    if plan.engine != "vllm":
        raise UsageError(
            f"--emit writes commands of vLLM, and the plan is for {plan.engine}",
            hint="plan with --engine vllm",
        )
    if plan.verdict.fits is False:
        raise DoesNotFitError(
            f"nothing to emit, for the plan does not fit: {plan.verdict.reason}",
            hint="see --advise or --fit",
        )
    first, model = _quantized(plan, _served(model))
    arguments = list(_arguments(plan, options, pin_kv_cache=pin_kv_cache))
    environment = _environment(plan, options)
    if kind == "vllm":
        return first + _command(model, arguments, environment)
    if kind not in ("compose", "k8s"):
        raise UsageError(f"unknown --emit {kind!r}", hint="vllm, compose or k8s")
    where = "cuda" if plan.device is None else plan.device.kind
    if where not in _IMAGES:
        raise UsageError(f"no image of vLLM for {where} is known", hint="use --emit vllm")
    path, local = _inside(model)
    head = first + _remark(plan, local)
    words = [path, *(word for argument in arguments for word in argument)]
    parts = _compose if kind == "compose" else _kubernetes
    return head + parts(plan, words, environment, _gpus(plan, options), where, local=bool(local))


def _quantized(plan: Plan, model: str) -> tuple[str, str]:
    """A remark on the checkpoint that has to be written first, and what is served."""
    wish = wish_of(plan.options.asked)
    if wish is None:
        return "", model
    path = model.rstrip("/")
    local = "://" not in path and (path.startswith(("/", ".", "~")) or Path(path).exists())
    name = re.sub(r"[^a-z0-9]+", "-", wish.label).strip("-")
    out = f"{path if local else './' + PurePath(path).name}-{name}"
    choice, rest = wish.default, [one for _, one in wish.rules if one is not None]
    words = ["tightfit", "quantize", model, out]
    if choice is None or rest or wish.kv_cache:
        words += ["--recipe", "RECIPE"]
    else:
        words += ["--scheme", choice.scheme]
        words += ["--group-size", str(choice.group_size)] if choice.group_size else []
        words += ["--format", choice.format] if choice.format != COMPRESSED_TENSORS else []
        words += [word for pattern, _ in wish.rules for word in ("--ignore", pattern)]
    return f"# First: {shlex.join(words)}\n", out


def _command(model: str, arguments: list[list[str]], environment: Mapping[str, str]) -> str:
    start = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), "vllm serve"])
    lines = [f"{start} {shlex.quote(model)}", shlex.join(["--host", "127.0.0.1"])]
    return " \\\n  ".join(lines + [shlex.join(argument) for argument in arguments]) + "\n"


def _arguments(
    plan: Plan, options: PlanOptions | None, *, pin_kv_cache: bool
) -> Iterator[list[str]]:
    """The flags, each with its values."""
    resolved = plan.options
    for name, short in (("tensor_parallel_size", "tp"), ("pipeline_parallel_size", "pp")):
        size = getattr(resolved, name).value
        if size > 1:
            yield [f"-{short}", str(size)]
    for name, value in _asked(plan, options).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield [flag]
        elif value is False:
            yield ["--no-" + name.replace("_", "-")]
        elif isinstance(value, Mapping):
            if name == "compilation_config" and before(plan.engine_version, "0.12"):
                value = {_OLD_KEYS.get(key, key): one for key, one in value.items()}
            yield [flag, json.dumps(dict(value), separators=(",", ":"))]
        elif isinstance(value, tuple):
            yield [flag, *map(str, value)]
        else:
            yield [flag, str(value)]
    given = resolved.kv_cache_memory_bytes
    if plan.kv_cache.num_blocks is not None and (pin_kv_cache or given.origin == "flag"):
        pool = max(rank.component("kv_cache").planned_bytes for rank in plan.ranks)
        if not before(plan.engine_version, "0.10.2"):
            yield ["--kv-cache-memory-bytes", str(pool)]


def _asked(plan: Plan, options: PlanOptions | None) -> dict[str, Any]:
    """What is not a default, by the names of vLLM's flags."""
    found: dict[str, Any] = {}
    for one in fields(options) if options is not None else ():
        value = getattr(options, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if value != default:
            found[one.name] = value
    for name in plan.options.__dataclass_fields__:
        option = getattr(plan.options, name)
        if not isinstance(option, Option) or option.origin in ("engine default", "config"):
            found.pop(name, None)
        elif option.origin in ("flag", "fitted"):
            found[name] = _spelled(name, option.value)
    if plan.entrypoint != "server":
        # The server, which is what is emitted, has other defaults.
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            found[name] = getattr(plan.options, name).value
    if wish_of(plan.options.asked) is not None:
        # The checkpoint says it, once it is written.
        found.pop("quantization", None)
    sizes = found.get("cudagraph_capture_sizes")
    if found.get("enforce_eager") or sizes == () or "max_cudagraph_capture_size" in found:
        found.pop("cudagraph_capture_sizes", None)
    return {
        name: value
        for name, value in found.items()
        if name in MATTERS and name not in _ELSEWHERE and value is not None
    }


def _spelled(name: str, value: Any) -> Any:
    """A resolved dtype in vLLM's words."""
    if name == "dtype":
        return next((word for word, dtype in TORCH_DTYPES.items() if dtype == value), value)
    if name == "kv_cache_dtype":
        return next((word for word, dtype in KV_DTYPES.items() if dtype == value), value)
    return value


def _environment(plan: Plan, options: PlanOptions | None) -> dict[str, str]:
    found = {}
    runner = plan.options.model_runner
    if runner is not None and runner.origin == "flag":
        found["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner.value == "v2" else "0"
    if options is not None and options.allow_long_max_model_len:
        found["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if options is not None and options.cpu_kvcache_space is not None:
        found["VLLM_CPU_KVCACHE_SPACE"] = f"{options.cpu_kvcache_space:g}"
    return found


def _gpus(plan: Plan, options: PlanOptions | None) -> int:
    size = plan.options.tensor_parallel_size.value * plan.options.pipeline_parallel_size.value
    return size * (1 if options is None else options.data_parallel_size)


def _served(model: str) -> str:
    """A plan may be made of a config alone; vLLM takes the directory that holds it."""
    if PurePath(model).name != "config.json":
        return model
    directory = model[: -len("config.json")].rstrip("/")
    rooted = "://" in model or model.startswith(("/", ".", "~"))
    return (directory or "/") if rooted else f"./{directory}"


def _inside(model: str) -> tuple[str, str | None]:
    """What the container calls the model, and the name of a local directory, if it is one."""
    path = model.replace("\\", "/")
    if "://" in path:
        return model, None
    if not path.startswith(("/", ".", "~")) and path.count("/") < 2 and not Path(model).exists():
        return model, None
    name = PurePath(path).name or "model"
    return f"/models/{name}", name


def _remark(plan: Plan, local: str | None) -> str:
    replicas = plan.options.data_parallel_size
    count = len(plan.ranks) * (1 if replicas is None else replicas.value)
    device = "" if plan.device is None else f" on {count} x {plan.device.name}"
    lines = [f"{plan.model.name}{device} with vLLM {plan.engine_version}, as planned by tightfit"]
    if local is not None:
        lines.append(f"Put the directory {local} into the volume `models` first")
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _host_bytes(plan: Plan) -> int:
    return sum(component.planned_bytes for component in plan.host)


def _shared_bytes(gpus: int) -> int:
    """Ranks exchange messages, and NCCL its buffers, through /dev/shm; docker gives 64 MiB."""
    return (1 + gpus) * GiB


def _compose(
    plan: Plan,
    words: list[str],
    environment: Mapping[str, str],
    gpus: int,
    where: str,
    *,
    local: bool,
) -> str:
    service: dict[str, Any] = {
        "image": f"{_IMAGES[where]}:v{plan.engine_version}",
        "entrypoint": ["vllm", "serve"],
        # compose would take a dollar for a variable
        "command": [word.replace("$", "$$") for word in words],
        "environment": {"HF_TOKEN": "${HF_TOKEN:-}", **environment},
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "volumes": [f"huggingface:{_CACHE}", *(["models:/models:ro"] if local else [])],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _PROBE],
            "start_period": f"{_START_SECONDS}s",
        },
    }
    if gpus > 1:
        service["shm_size"] = f"{_shared_bytes(gpus) // MiB}m"
    reserved: dict[str, Any] = {}
    if where == "cuda":
        reserved["devices"] = [{"driver": "nvidia", "count": gpus, "capabilities": ["gpu"]}]
    else:
        service |= {"devices": ["/dev/kfd", "/dev/dri"], "group_add": ["video"]}
    if plan.host:
        reserved["memory"] = f"{cdiv(_host_bytes(plan), MiB)}m"
    if reserved:
        service["deploy"] = {"resources": {"reservations": reserved}}
    volumes: dict[str, Any] = {"huggingface": {}} | ({"models": {}} if local else {})
    return _yaml({"services": {"vllm": service}, "volumes": volumes})


_PROBE = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health')"


def _kubernetes(
    plan: Plan,
    words: list[str],
    environment: Mapping[str, str],
    gpus: int,
    where: str,
    *,
    local: bool,
) -> str:
    name = _dns_name(plan.model.name)
    labels = {"app": name}
    volumes: list[dict[str, Any]] = [{"name": "huggingface", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "huggingface", "mountPath": _CACHE}]
    if gpus > 1:
        size = f"{_shared_bytes(gpus) // MiB}Mi"
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if local:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": "models"}})
        mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
    resources: dict[str, Any] = {
        "limits": {"nvidia.com/gpu" if where == "cuda" else "amd.com/gpu": gpus}
    }
    if plan.host:
        host_bytes = _host_bytes(plan) + (_shared_bytes(gpus) if gpus > 1 else 0)
        resources["requests"] = {"memory": f"{cdiv(host_bytes, MiB)}Mi"}
    probe = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 10}
    token = {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}
    container = {
        "name": "vllm",
        "image": f"{_IMAGES[where]}:v{plan.engine_version}",
        "command": ["vllm", "serve"],
        # Kubernetes would take $(NAME) for a variable
        "args": [word.replace("$(", "$$(") for word in words],
        "env": [
            {"name": "HF_TOKEN", "valueFrom": token},
            *({"name": key, "value": value} for key, value in environment.items()),
        ],
        "ports": [{"containerPort": PORT}],
        "resources": resources,
        "volumeMounts": mounts,
        "startupProbe": {**probe, "failureThreshold": _START_SECONDS // 10},
        "readinessProbe": probe,
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            # The old pod must free its GPUs before the new one can have them.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                # A service called vllm would set VLLM_PORT, which vLLM reads as its own.
                "spec": {
                    "enableServiceLinks": False,
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "type": "ClusterIP",
            "selector": labels,
            "ports": [{"name": "http", "port": PORT, "targetPort": PORT}],
        },
    }
    return _yaml(deployment) + "---\n" + _yaml(service)


def _dns_name(model: str) -> str:
    """A name that Kubernetes takes (RFC 1123 label)."""
    name = re.sub(r"[^a-z0-9]+", "-", PurePath(model).name.lower()).strip("-")
    return f"vllm-{name}"[:50].rstrip("-")


def _yaml(document: Mapping[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Writes what occurs twice twice: people edit these files."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    text: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, width=100)
    return text
