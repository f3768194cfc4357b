"""What deploy/ holds, as Python sees it: manifests, pods, and what they run."""

import gzip
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.kubectl import find

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CONFIG = KUBERNETES / "config"
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
SCHEMAS = ROOT.parent / "shared" / "schemas"
"""KubeRay's CRD schemas; beside the repository, not in it."""

KUBERAY = ("RayCluster", "RayJob", "RayCronJob")

Document = dict[str, Any]


def patches(folder: Path) -> set[str]:
    """Files of an overlay that only change objects of others."""
    file = folder / "kustomization.yaml"
    listed = yaml.safe_load(file.read_text()).get("patches", []) if file.exists() else []
    return {patch["path"] for patch in listed if "path" in patch}


def objects() -> dict[str, Document]:
    """Every manifest as it stands in its file: {nightly/prune.yaml#0: document}."""
    found: dict[str, Document] = {}
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        if path.name in patches(path.parent):
            continue
        for i, document in enumerate(yaml.safe_load_all(path.read_text())):
            if document.get("kind", "Kustomization") not in ("Kustomization", "Component"):
                found[f"{path.relative_to(KUBERNETES)}#{i}"] = document
    return found


def rendered(overlay: Path) -> list[Document]:
    """What `kubectl apply -k` would send."""
    kubectl = find()
    assert kubectl is not None
    text = subprocess.run([kubectl, "kustomize", str(overlay)], check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def crd_schema(kind: str) -> Document:
    with gzip.open(SCHEMAS / f"{kind.lower()}-v1.schema.json.gz") as file:
        return json.load(file)


def pods(document: Document) -> Iterator[Document]:
    """Every pod spec inside, however deep: whatever has a list of containers."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def containers(document: Document) -> Iterator[Document]:
    for pod in pods(document):
        yield from pod["containers"]


def command_lines(document: Document) -> Iterator[str]:
    """What is run: entrypoints of Ray's jobs, and the arguments of containers."""
    spec = document["spec"]
    for holder in (spec, spec.get("jobTemplate", {})):
        if "entrypoint" in holder:
            yield holder["entrypoint"]
    for container in containers(document):
        yield shlex.join([*container.get("command", []), *container.get("args", [])])
