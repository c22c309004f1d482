"""A real S3 server on the loopback interface: moto's, in a thread."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3:
    """The server's address, and what is in its buckets."""

    def __init__(self, url: str) -> None:
        import boto3

        self.url = url
        self.env = {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1"}
        self.client: Any = boto3.client("s3", endpoint_url=url)

    def bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def keys(self, bucket: str, prefix: str = "") -> set[str]:
        found = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix)
        return {entry["Key"].removeprefix(prefix) for entry in found.get("Contents", ())}

    def uploads(self, bucket: str) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=bucket)
        return [upload["Key"] for upload in found.get("Uploads", ())]


@contextmanager
def running_s3() -> Iterator[S3]:
    """The server; its address and credentials are in the environment meanwhile."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    try:
        os.environ.update(CREDENTIALS)
        s3 = S3(f"http://{host}:{port}")
        os.environ.update(s3.env)
        yield s3
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
