#!/usr/bin/env bash
# In an fsspec transaction on S3 pipe() and put() take effect at once and stay if it fails; on a disk pipe() waits.
#
# Guess: within `with fs.transaction` all that is written through fs waits for its end, or none of it stays.
# Seen, s3fs and fsspec 2026.9.0: of a transaction that ends with an exception only the file written through open() is
# gone. On S3 what pipe() and put() wrote is there, and what rm() named is not. On a local disk pipe() goes through
# open() and waits, put() does not: so a program tried on a disk loses nothing there and half a record in the cloud.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    s3fs==2026.9.0 fsspec==2026.9.0 'moto[server,s3]==5.2.5'
mkdir "$place/disk"
cd "$place"
export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=us-east-1
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import os
from importlib.metadata import version
from pathlib import Path

import fsspec
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
print("s3fs", version("s3fs"), "fsspec", version("fsspec"), "moto", version("moto"))
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
Path("source").write_text("new")


def left(fs, folder):
    fs.pipe(f"{folder}/old", b"old")
    try:
        with fs.transaction:
            with fs.open(f"{folder}/open", "wb") as file:
                file.write(b"new")
            fs.pipe(f"{folder}/pipe", b"new")
            fs.put("source", f"{folder}/put")
            fs.rm(f"{folder}/old")
            raise RuntimeError("the record is not whole")
    except RuntimeError as error:
        fs.invalidate_cache()
        names = sorted(name.rsplit("/", 1)[-1] for name in fs.find(folder))
        print(type(fs).__name__, "after", repr(error), names)
        return names


host, port = server.get_host_and_port()
s3 = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}")
s3.mkdir("bucket")
try:
    assert left(s3, "bucket") == ["pipe", "put"]
    assert left(fsspec.filesystem("file"), os.path.abspath("disk")) == ["put"]
finally:
    server.stop()
PYTHON
