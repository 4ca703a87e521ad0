"""A Google Cloud Storage of one process: `python tests/gcs_server.py PORT BUCKET`.

gcp-storage-emulator, with what TensorStore relies on and it lacks: the generation of an object
beside its content, and writes that fail unless the object is of a given generation.
"""

from __future__ import annotations

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator import server  # pyright: ignore[reportMissingImports]
from gcp_storage_emulator.exceptions import NotFound  # pyright: ignore[reportMissingImports]
from gcp_storage_emulator.handlers import objects  # pyright: ignore[reportMissingImports]

LOCK = threading.Lock()


def _generation(storage, bucket: str, name: str) -> str:
    """The object's generation, "0" where there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, **kwargs):
    with LOCK:
        objects_download(request, response, storage, *args, **kwargs)
        bucket, name = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = _generation(storage, bucket, name)


def insert(request, response, storage, *args, **kwargs):
    with LOCK:
        wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
        if wanted and _generation(storage, request.params["bucket_name"], name[0]) != wanted[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        objects_insert(request, response, storage, *args, **kwargs)


objects_download, objects_insert = objects.download, objects.insert
objects.download = download  # `objects.get` calls it by this name
for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        handlers[method] = {objects_download: download, objects_insert: insert}.get(
            handler, handler
        )

if __name__ == "__main__":
    server.create_server(
        "127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]
    ).run()
