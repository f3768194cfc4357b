"""`inspect --lineage`: from a dataset, or a student, back to the first teacher, as recipes and kept models tell it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion import checkpoint
from storage_schemas import paths
from storage_schemas.errors import UsageError
from storage_schemas.recipe import DataStart, Recipe
from storage_schemas.store import Store

Link = dict[str, Any]


def lineage_of(store: Store, recipe_id: str, dataset: str) -> Iterator[Link]:
    """Data and models in turn, newest first; a link that isn't there says so, and is the last.

    A recipe names its teacher by the hash of its weights; `about.reads` of a kept student names what it was fitted to.
    """
    met = set[str]()
    following: str | None = recipe_id
    while following and following not in met:
        met.add(following)
        recipe = _recipe(store, following)
        if recipe is None:
            yield {
                "kind": "data",
                "recipe": following,
                "dataset": dataset,
                "missing": "the recipe is not in this store",
            }
            return
        yield {"kind": "data", "recipe": recipe.id, "dataset": dataset, **_made(recipe)}
        found = store.read(f"{paths.weights_folder(recipe.id)}/{checkpoint.MODEL_FILE}")
        model = _model(json.loads(found) if found else None, recipe.teacher.uri, recipe.teacher.weights_sha256)
        yield model
        following, dataset = model.get("recipe"), model.get("dataset", "")


def lineage_of_student(store: Store, folder: str) -> Iterator[Link]:
    """The same from a saved model on."""
    file = Path(folder) / checkpoint.MODEL_FILE
    if not file.is_file():
        raise UsageError(f"{folder} holds no {checkpoint.MODEL_FILE}: name the folder of a saved student")
    document = json.loads(file.read_text())
    model = _model(document, folder, document["weights_sha256"])
    yield model
    if "recipe" in model:
        yield from lineage_of(store, model["recipe"], model["dataset"])


def told(links: Iterator[Link]) -> str:
    """A line a link."""
    return "\n".join(_told_data(link) if link["kind"] == "data" else _told_model(link) for link in links)


def _recipe(store: Store, recipe_id: str) -> Recipe | None:
    path = paths.recipe_path(recipe_id)
    data = store.read(path)
    return None if data is None else Recipe.from_bytes(data, f"{store.uri}/{path}")


def _made(recipe: Recipe) -> Link:
    start = recipe.start.images if isinstance(recipe.start, DataStart) else "prior"
    solver = {"solver": recipe.solver.name, "steps": recipe.num_steps, "grid": recipe.solver.grid["name"]}
    return {"chain": recipe.chain, "start": start, "seed": recipe.noise.seed, "guidance": recipe.guidance.told} | solver


def _model(document: Mapping[str, Any] | None, uri: str, sha256: str) -> Link:
    """A student or a teacher. recipe: what it was fitted to, if that was data of another model."""
    link: Link = {"kind": "model", "uri": uri, "weights_sha256": sha256}
    if document is None:
        code = uri.startswith("python:")
        return link | ({} if code else {"missing": "its description was not kept: generate --with-weights keeps it"})
    if document["weights_sha256"] != sha256:
        return link | {"missing": f"the store keeps another model in its place, {document['weights_sha256'][:12]}"}
    about = document["about"]
    reads = about.get("reads") or {}
    link["serves"] = sorted(map(int, document["grids"]))
    link |= {name: about[name] for name in ("objective", "stage", "steps", "batch_size") if name in about}
    link |= {name: reads[name] for name in ("recipe", "dataset", "manifest", "images") if name in reads}
    return link


def _told_data(link: Link) -> str:
    lead = f"  fitted to {link['dataset'] or 'data'}, recipe {link['recipe'][:12]}"
    if "missing" in link:
        return f"{lead}: {link['missing']}"
    start = "from the prior" if link["start"] == "prior" else f"from {link['start']}"
    guidance = "" if link["guidance"] == "1" else f", guidance {link['guidance']}"
    grid = f"{link['solver']} in {link['steps']} steps, {link['grid']} grid"
    return f"{lead}: {link['chain']} data {start}, {grid}{guidance}, seed {link['seed']}, solved by"


def _told_model(link: Link) -> str:
    lead = f"{link['weights_sha256'][:12]} {link['uri']}"
    if "missing" in link:
        return f"{lead}: {link['missing']}"
    if "recipe" not in link:
        return f"{lead}: the first teacher" + (f", fitted to {link['images']}" if "images" in link else "")
    objective = link.get("objective", {}).get("name", "a student")
    serves = ", ".join(map(str, link["serves"])) + (" step" if link["serves"] == [1] else " steps")
    return f"{lead}: {objective}, serves {serves}, {_fitted(link)}"


def _fitted(link: Link) -> str:
    return f"fitted for {link.get('steps', '?')} steps of {link.get('batch_size', '?')} samples"
