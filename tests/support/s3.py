"""A real S3 server, moto's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from unittest import mock

BUCKET = "labs"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yield the environment under which s3:// is a server with an empty bucket; this process has it, too."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    env = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, env):
            files = s3fs.S3FileSystem(skip_instance_cache=True)
            files.mkdir(BUCKET)
            yield env
            files.rm(BUCKET, recursive=True)  # the servers of one process share what they hold
    finally:
        server.stop()
