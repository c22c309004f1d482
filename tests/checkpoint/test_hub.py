"""Against a loopback Hub, in subprocesses: huggingface_hub reads HF_ENDPOINT when imported."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from support.hub_server import HubServer

CLIENT = """
import json, sys
from tightfit.checkpoint import hub
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import TightfitError
hub._TIMEOUT_SECONDS = 1.0
for model, options in json.loads(sys.argv[1]):
    try:
        c = open_checkpoint(model, **options)
        config_path = c.source.local_path("config.json")
        result = {"name": c.name, "config": c.config, "files": c.files,
                  "tensors": sorted(c.tensors()), "local": str(config_path or "")}
    except TightfitError as e:
        result = {"error": f"{type(e).__name__}: {e}", "hint": e.hint}
    print(json.dumps(result))
"""


def client(server: HubServer, cache, *models, **env: str) -> list[dict]:
    calls = [m if isinstance(m, tuple) else (m, {}) for m in models]
    process = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(calls)],
        env=server.env(cache, **env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == len(models)
    if not any(options.get("download") for _, options in calls):
        assert "it/s" not in process.stderr
    return results


def big(*names: str) -> bytes:
    return save({name: np.zeros((1000, 1000), np.float32) for name in names})


def two_files() -> dict[str, bytes]:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return {
        "config.json": b'{"hidden_size": 8}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-00001-of-00002.safetensors": big("a"),
        "model-00002-of-00002.safetensors": big("b"),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "pytorch_model.bin": bytes(10),
        "modeling_x.py": b"import os",
        "original/consolidated.safetensors": big("a"),
        "original/params.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "2_Dense/model.safetensors": big("a"),
        "additional_chat_templates/rag.jinja": b"{}",
    }


def test_opening_transfers_only_headers(hub, tmp_path):
    hub.add("org/model", two_files())
    (result,) = client(hub, tmp_path, "org/model")
    assert result == {
        "name": "org/model",
        "config": {"hidden_size": 8},
        "files": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "tensors": ["a", "b"],
        "local": "",
    }
    assert len(big("a")) + len(big("b")) > 8_000_000
    assert hub.bytes_sent("/cdn/") == 200_000
    assert hub.bytes_sent() < 210_000
    assert all(r.range for r in hub.requests if "/cdn/" in r.path)
    assert not any(name in r.path for r in hub.requests for name in (".bin", ".py", "original"))


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub, tmp_path):
    hub.add("org/gated", two_files(), gated=True)
    (result,) = client(hub, tmp_path, "org/gated", HF_TOKEN="let-me-in")
    assert result["tensors"] == ["a", "b"]
    for request in hub.requests:
        assert request.authorization == (None if "/cdn/" in request.path else "Bearer let-me-in")


def test_download_takes_what_is_needed_and_the_cache_is_used_afterwards(hub, tmp_path):
    hub.add("org/model", two_files())
    (first,) = client(hub, tmp_path, ("org/model", {"download": True}))
    assert first["tensors"] == ["a", "b"]
    (snapshot,) = (tmp_path / "hub" / "models--org--model" / "snapshots").iterdir()
    there = (path for path in snapshot.rglob("*") if path.is_file())
    assert sorted(path.relative_to(snapshot).as_posix() for path in there) == [
        "1_Pooling/config.json",
        "additional_chat_templates/rag.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    hub.clear()
    again = client(hub, tmp_path, "org/model", ("org/model", {"revision": snapshot.name}))
    assert hub.requests == []
    offline = client(
        hub, tmp_path, "org/model", ("org/model", {"download": True}), HF_HUB_OFFLINE="1"
    )
    for result in (*again, *offline):
        assert result == first
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    (partial,) = client(hub, tmp_path, "org/model")
    assert partial["tensors"] == ["a", "b"]
    assert partial["local"] == ""
    assert 0 < hub.bytes_sent("/cdn/") <= 200_000


def test_a_config_in_the_cache_is_used_when_the_hub_is_gone(hub, tmp_path):
    hub.add("org/model", two_files())
    client(hub, tmp_path, "org/model")
    (result,) = client(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert (result["config"], result["files"]) == ({"hidden_size": 8}, [])
    hub.repos["org/model"].status = 500
    (result,) = client(hub, tmp_path, "org/model")
    assert (result["config"], result["files"]) == ({"hidden_size": 8}, [])


def test_revisions_and_pages(hub, tmp_path):
    hub.add("org/model", {"config.json": b'{"v": 2}', "model.safetensors": big("new")})
    hub.add("org/model", {"config.json": b'{"v": 1}', "x.safetensors": big("old")}, revision="v1")
    results = client(
        hub,
        tmp_path,
        "org/model",
        ("org/model", {"revision": "v1"}),
        "https://huggingface.co/org/model/tree/v1",
        "hf://org/model@v1",
        "https://huggingface.co/org/model",
    )
    assert [r["config"]["v"] for r in results] == [2, 1, 1, 1, 2]
    assert [r["tensors"] for r in results] == [["new"], ["old"], ["old"], ["old"], ["new"]]


def test_errors_are_one_line_with_a_remedy(hub, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": big("a")}
    hub.add("org/ok", files)
    hub.add("org/gated", files, gated=True)
    hub.add("org/down", files, status=503)
    hub.add("org/denied", files, status=403)
    hub.add("org/limited", files, status=429)
    hub.add("org/slow", files, slow_seconds=1.5)
    hub.add("org/no-ranges", {**files, "model.safetensors": big("b")}, ranges=False)
    hub.add("org/no-config", {"model.safetensors": big("a")})
    expected = {
        "org/none": (
            f"ConfigError: there is no local path org/none and no model org/none on {hub.url} "
            "that you may see",
            "HF_TOKEN",
        ),
        "noname": (
            f"ConfigError: there is no local path noname and no model noname on {hub.url} "
            "that you may see",
            "spelling",
        ),
        "not an id": (
            "ConfigError: 'not an id' is neither a local path nor a valid Hub id",
            "organization/name",
        ),
        "org/gated": (
            "ConfigError: access to org/gated is restricted",
            f"ask for access on {hub.url}/org/gated, then set HF_TOKEN",
        ),
        "org/denied": (f"ConfigError: {hub.url} refused access to org/denied (status 403)", "HF_T"),
        "org/down": (
            f"HubUnreachableError: {hub.url} answered org/down with status 503",
            "try again later",
        ),
        "org/limited": (
            f"HubUnreachableError: {hub.url} answered org/limited with status 429",
            "try again later",
        ),
        "org/slow": (
            f"HubUnreachableError: cannot reach {hub.url} for org/slow: no answer in 1 s",
            "HF_ENDPOINT",
        ),
        "org/no-config": ("ConfigError: org/no-config has no config.json", "config.json"),
    }
    results = client(hub, tmp_path, *expected, ("org/ok", {"revision": "v9"}), "org/no-ranges")
    *plain, revision, ranges = results
    for (error, hint), result in zip(expected.values(), plain, strict=True):
        assert result["error"] == error
        assert hint in result["hint"]
    assert revision["error"] == "ConfigError: org/ok has no revision 'v9'"
    assert ranges["error"].startswith(f"CheckpointError: {hub.url}/org/no-ranges/resolve/")
    assert ranges["error"].endswith("/model.safetensors ignores byte ranges (status 200)")


@pytest.mark.parametrize("download", [False, True])
def test_offline_and_unreachable(hub, tmp_path, download):
    options = {"download": download}
    (offline,) = client(hub, tmp_path, ("org/model", options), HF_HUB_OFFLINE="1")
    assert offline["error"] == (
        "HubUnreachableError: org/model is neither a local path nor in the local cache, and "
        "HF_HUB_OFFLINE forbids to ask the Hub"
    )
    (gone,) = client(hub, tmp_path, ("org/model", options), HF_ENDPOINT="http://127.0.0.1:9")
    assert gone["error"].startswith(
        "HubUnreachableError: cannot reach http://127.0.0.1:9 for org/model: "
    )
    assert "\n" not in gone["error"]
    assert hub.requests == []


def test_a_truncated_remote_file_is_found_without_downloading_it(hub, tmp_path):
    hub.add("org/cut", {"config.json": b"{}", "model.safetensors": big("a")[:-1]})
    (result,) = client(hub, tmp_path, "org/cut")
    assert result["error"] == (
        "CheckpointError: model.safetensors: tensor 'a' ends at byte 4000000 of the data, "
        "and the file holds 3999999: it is truncated"
    )
    assert hub.bytes_sent("/cdn/") == 100_000


def test_a_short_outage_of_the_cdn_is_waited_out_and_a_long_one_is_not(hub, tmp_path):
    hub.add("org/short", {"config.json": b"{}", "model.safetensors": big("a")}, cdn_failures=1)
    hub.add("org/long", {"config.json": b"{}", "model.safetensors": big("b")}, cdn_failures=99)
    short, long = client(hub, tmp_path, "org/short", "org/long")
    assert short["tensors"] == ["a"]
    assert long["error"] == f"HubUnreachableError: {hub.url} answered org/long with status 503"
