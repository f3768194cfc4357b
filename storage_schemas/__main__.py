"""`python -m storage_schemas` prints the JSON Schema of every document in a store."""

import json

from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.job import Failure, Heartbeat, Job, Mark, Pin, Prune
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.notes import Calibration
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import StoreDocument

DOCUMENTS: dict[str, type[Document]] = {
    "store.json": StoreDocument,
    "recipes/<recipe id>/recipe.json": Recipe,
    "recipes/<recipe id>/notes/calibration-<digest>.json": Calibration,
    "recipes/<recipe id>/<layout>/commits/<task>.json": Commit,
    "recipes/<recipe id>/<layout>/records/<task>-<attempt>.json": Commit,
    "datasets/<name>/manifests/<number>.json": Manifest,
    "jobs/<job>/job.json": Job,
    "jobs/<job>/failures/<task>.json": Failure,
    "jobs/<job>/heartbeat.json": Heartbeat,
    "jobs/<job>/dead.json": Mark,
    "pins/<run>.json": Pin,
    "prunes/<number>.json": Prune,
}


def schemas() -> dict[str, object]:
    """Where a document lies -> its JSON Schema."""
    return {path: document.model_json_schema() for path, document in DOCUMENTS.items()}


if __name__ == "__main__":
    print(json.dumps(schemas(), indent=2))
