"""The command line against a real S3 server: killed, denied, and without a bucket."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.random_llama import make_random_llama
from support.s3_server import S3, running_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "m"
    return make_random_llama(directory, hidden=512, layers=4, vocab=8192)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def stored(s3: S3, bucket: str, prefix: str) -> dict[str, str]:
    return {
        key: hashlib.sha256(s3.get(bucket, prefix + key)).hexdigest()
        for key in s3.keys(bucket, prefix)
    }


def test_killed_and_resumed(s3: S3, model: Path, tmp_path: Path) -> None:
    bucket, url = s3.bucket("killed"), "s3://killed/out"
    options = ["-tp", "4", "--max-shard-size", "1MiB"]
    command = [sys.executable, "-m", "tightfit", "shard", os.fspath(model), url, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        len(notes := [k for k in s3.keys(bucket, "out/") if "-part-" in k and k.endswith("json")])
        < 9
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = s3.keys(bucket, "out/")
    assert "tightfit-manifest.json" not in there
    done = tightfit("verify", url)
    assert done.returncode == 1
    assert f"{url} is not whole: of 4 ranks it lacks 0-3 (begun: " in done.stderr
    before = {
        e["Key"]: e["LastModified"] for e in s3.client.list_objects_v2(Bucket=bucket)["Contents"]
    }
    done = tightfit("shard", model, url, *options)
    assert_error(done, 2, f"the output directory {url} holds an unfinished output")
    done = tightfit("shard", model, url, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert s3.uploads(bucket) == []
    for note in notes:
        name = "out/" + note.partition("-model-")[2].removesuffix(".json")
        name = name.replace("out/", "out/model-")
        head = s3.client.head_object(Bucket=bucket, Key=name)
        assert head["LastModified"] == before[name]
    assert tightfit("shard", model, tmp_path / "out", *options).returncode == 0
    assert stored(s3, bucket, "out/") == digests(tmp_path / "out")


def test_there_and_back(s3: S3, model: Path, tmp_path: Path) -> None:
    s3.bucket("back")
    done = tightfit("shard", model, "s3://back/tp2", "-tp", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output"] == "s3://back/tp2"
    done = tightfit("verify", "s3://back/tp2", "--against", model)
    assert done.returncode == 0
    assert done.stdout.startswith("verified: s3://back/tp2 is whole: 2 files, ")
    assert "every byte as in its source" in done.stdout
    # Cut again from one address to another, without a file here.
    done = tightfit("shard", "s3://back/tp2", "s3://back/tp4", "-tp", "4")
    assert done.returncode == 0, done.stderr
    assert tightfit("shard", model, tmp_path / "tp4", "-tp", "4").returncode == 0
    assert stored(s3, "back", "tp4/") == digests(tmp_path / "tp4")
    done = tightfit("merge", "s3://back/tp4", tmp_path / "merged", "--max-shard-size", "20MB")
    assert done.returncode == 0, done.stderr
    done = tightfit("merge", "s3://back/tp4", "s3://back/m", "--max-shard-size", "20MB")
    assert done.returncode == 0, done.stderr
    assert stored(s3, "back", "m/") == digests(tmp_path / "merged")
    done = tightfit("merge", "s3://back/tp4", "s3://back/m", "--max-shard-size", "20MB")
    assert_error(done, 2, "the output directory s3://back/m is not empty")
    done = tightfit("verify", "s3://back/tp4", "--against", tmp_path / "merged")
    assert done.returncode == 0, done.stdout


def test_no_bucket(s3: S3, model: Path) -> None:
    url = "s3://no-such-bucket/out"
    done = tightfit("shard", model, url, "-tp", "2")
    assert done.returncode == 2
    assert "there is no such bucket" in done.stderr
    assert "check its name, or create it first" in done.stderr
    done = tightfit("plan", "s3://no-such-bucket/model")
    assert done.returncode == 2
    assert "there is no such bucket" in done.stderr


def test_no_credentials(s3: S3, model: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env |= {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": os.fspath(tmp_path),
    }
    done = tightfit("shard", model, "s3://any/out", "-tp", "2", env=env)
    assert done.returncode == 2
    assert "no credentials were found" in done.stderr
    assert "AWS_PROFILE" in done.stderr


def test_only_for_reading(model: Path) -> None:
    done = tightfit("shard", model, "http://127.0.0.1:9/out", "-tp", "2")
    assert done.returncode == 2
    assert "nothing can be written to http://127.0.0.1:9/out" in done.stderr
