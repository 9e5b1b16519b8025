"""S3 in this process, behind a proxy that can fail."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from faulty_proxy import Fault, faulty_proxy


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> Iterator[tuple[Any, str]]:
    """Files past the proxy, and a new bucket's name; what reads the environment's settings goes through the proxy."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name, value in {"ACCESS_KEY_ID": "nobody", "SECRET_ACCESS_KEY": "none", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with faulty_proxy(f"http://{host}:{port}", fault) as address:
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            s3fs.S3FileSystem.clear_instance_cache()
            files = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", use_listings_cache=False)
            bucket = f"line-{uuid.uuid4()}"  # moto keeps what earlier tests have left
            files.mkdir(bucket)
            yield files, bucket
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
