"""A bucket in memory: gcp-storage-emulator with what TensorStore asks of Google and it has not.

The emulator names no generation of what it hands out and heeds no condition on one. Google does
both (docs/results/object_storage.py shows what fails without), so both are added here.

Needs the test extra: python -m tests.bucket PORT [NAME]
"""

import os
import re
import sys
import time
from functools import partial
from http import HTTPStatus, server
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = "bucket"
# Of every write, as from afar: so that a save is long enough to be met.
LATENCY_SECONDS = 0.05


def environment(port: int) -> dict[str, str]:
    """What sends gcsfs, Google's client and TensorStore there."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "NO_GCE_CHECK": "true",  # there is no machine of Google's to ask for credentials
    }


class Handler(RequestHandler):
    """Answers 412 and 304 where a condition fails, and names the generation of what it sends."""

    def do_GET(self) -> None:  # noqa: N802  (http.server's name)
        generation = self._generation()
        if self._asked("ifGenerationNotMatch") == generation:
            self._refuse(HTTPStatus.NOT_MODIFIED)
        else:
            self._named = generation
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802  (http.server's name)
        time.sleep(LATENCY_SECONDS)
        if self._asked("ifGenerationMatch") in (None, self._generation()):
            super().do_POST()
        else:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._refuse(HTTPStatus.PRECONDITION_FAILED)

    def do_DELETE(self) -> None:  # noqa: N802  (http.server's name)
        if self._asked("ifGenerationMatch") in (None, self._generation()):
            super().do_DELETE()
        else:
            self._refuse(HTTPStatus.PRECONDITION_FAILED)

    def end_headers(self) -> None:
        if getattr(self, "_named", "0") != "0":
            self.send_header("X-Goog-Generation", self._named)
        super().end_headers()

    def _generation(self) -> str:
        """Of the object that is asked for or written; 0 where there is none, as Google counts."""
        found = re.search(r"/b/([^/]+)/o(?:/(.+))?$", urlsplit(self.path).path)
        if not found:
            return "0"
        name = unquote(found[2]) if found[2] else self._asked("name")
        return self.storage.objects.get(found[1], {}).get(name, {}).get("generation", "0")

    def _asked(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.path).query).get(name, [None])[0]

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(server.ThreadingHTTPServer):
    """Keeps as many connections waiting as clients open at once.

    Of more than the five that http.server allows, the system drops some, and their clients wait
    for seconds, each time twice as long.
    """

    request_queue_size = 128


def serve(port: int, name: str = NAME, handler: type[RequestHandler] = Handler) -> None:
    """Until killed."""
    storage = Storage(use_memory_fs=True, data_dir=os.sep)
    create_bucket(name, storage)
    Server(("127.0.0.1", port), partial(handler, storage)).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
