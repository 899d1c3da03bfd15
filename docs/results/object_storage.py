"""What can be written to object storage: text, arrays and a whole train state, tried on emulators.

    pip install -e '.[test]' 'moto[s3]' flask flask-cors s3fs
    python docs/results/object_storage.py > docs/results/object_storage.json

Three stores: gs:// on gcp-storage-emulator as it is; the same with what Google has and it lacks
(tests/bucket.py); s3:// on moto's server. On each: text through etils' epath, bytes through
TensorStore's own driver, and a state of many arrays through Orbax, saved twice and restored. What
fails is kept with the words it failed with.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orbax-checkpoint", "tensorstore", "etils", "fsspec", "gcsfs", "google-cloud-storage")
SERVERS = ("gcp-storage-emulator", "moto", "s3fs")
PLAIN = (
    "import sys; sys.path.insert(0, '.'); from tests.bucket import RequestHandler, serve; "
    "serve(int(sys.argv[1]), handler=RequestHandler)"
)
LEAVES = 200


def stores(port: int) -> dict[str, tuple[list[str], str, dict[str, Any], dict[str, str]]]:
    """By name: the server's command, the URL, TensorStore's driver, and the environment."""
    address = f"http://127.0.0.1:{port}"
    google = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "tests",
    }
    amazon = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    python = sys.executable
    s3 = {"driver": "s3", "bucket": "bucket", "endpoint": address, "aws_region": "us-east-1"}
    gcs = {"driver": "gcs", "bucket": "bucket"}
    moto = [python, "-m", "moto.server", "-p", str(port)]
    return {
        "gs:// on gcp-storage-emulator": ([python, "-c", PLAIN, str(port)], "gs", gcs, google),
        "gs:// on tests/bucket.py": ([python, "-m", "tests.bucket", str(port)], "gs", gcs, google),
        "s3:// on moto's server": (moto, "s3", s3, amazon),
    }


def text(scheme: str, driver: dict[str, Any]) -> None:
    """A file written and read again."""
    from etils import epath

    path = epath.Path(f"{scheme}://bucket/text/a.txt")
    path.write_text("words")
    assert path.read_text() == "words"


def arrays(scheme: str, driver: dict[str, Any]) -> None:
    """A value written, read with the condition that it has changed, and overwritten."""
    import tensorstore as ts

    store = ts.KvStore.open(driver | {"path": "values/"}).result(timeout=30)
    store.write("a", b"1").result(timeout=30)
    first = store.read("a").result(timeout=30)
    store.write("a", b"2", if_equal=first.stamp.generation).result(timeout=30)
    again = store.read("a", if_not_equal=first.stamp.generation).result(timeout=30)
    assert again.value == b"2", again


def state(scheme: str, driver: dict[str, Any]) -> None:
    """A checkpoint of many arrays, twice, and restored."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    with ocp.CheckpointManager(
        epath.Path(f"{scheme}://bucket/run/checkpoints"),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1),
    ) as manager:
        for step in (1, 2):
            tree = {f"leaf{i}": jax.numpy.full((64, 3), i + step) for i in range(LEAVES)}
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
        assert manager.all_steps() == [2]
        found = manager.restore(2, args=ocp.args.StandardRestore(tree))
        jax.tree.map(np.testing.assert_array_equal, found, tree)


ATTEMPTS = {"text, epath": text, "bytes, TensorStore": arrays, "state, Orbax": state}


def attempt(name: str, scheme: str, driver: dict[str, Any]) -> str:
    """``works``, or the error in one line."""
    try:
        ATTEMPTS[name](scheme, driver)
    except Exception as error:  # whatever it is: it is what this page is about
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return "works"


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tried(store: str) -> dict[str, str]:
    """All attempts on one store, each in a process of its own."""
    port = free_port()
    command, scheme, driver, environment = stores(port)[store]
    environment = os.environ | environment | {"JAX_PLATFORMS": "cpu"}
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while server.poll() is None:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        if scheme == "s3":
            subprocess.run(
                [sys.executable, "-c", "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"],
                env=environment,
                check=True,
            )
        found = {}
        # What takes a URL for a path shall make its folders elsewhere.
        with tempfile.TemporaryDirectory() as elsewhere:
            for name in ATTEMPTS:
                asked = json.dumps([name, scheme, driver])
                done = subprocess.run(
                    [sys.executable, Path(__file__).resolve(), asked],
                    cwd=elsewhere,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                found[name] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(attempt(*json.loads(sys.argv[1]))), flush=True)
        os._exit(0)  # threads of a failed save would wait for ever
    versions = {package: version(package) for package in (*PACKAGES, *SERVERS)}
    results = {store: tried(store) for store in stores(0)}
    print(json.dumps({"versions": versions, "stores": results}, indent=2))
