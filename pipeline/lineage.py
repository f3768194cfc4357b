"""`inspect --lineage`: from a dataset, or a student, back to the first teacher, as recipes and kept models record it.

Newest first: after a model comes the one that its weights began as, if it began as a saved one, and what is behind
that; then the data that it was fitted to, and the model that made those. No data are listed twice.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.description import described
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.errors import UsageError, shown, usage_errors
from limbeck.storage_schemas.reading import read_document
from limbeck.storage_schemas.recipe import DataStart, Recipe
from limbeck.storage_schemas.store import Store

Link = dict[str, Any]


def lineage_of(store: Store, recipe_id: str, dataset: str) -> Iterator[Link]:
    """Data, the model that made them, and so on; a link that isn't there says so, and nothing is known behind it.

    A recipe names its teacher by the hash of its weights; `about` of a kept student names what it was fitted to
    (`reads`), and holds what was known of the model that it began as (`init`).
    """
    return _behind_data(store, recipe_id, dataset, set())


def lineage_of_student(store: Store, folder: str) -> Iterator[Link]:
    """The same from a saved model on."""
    file = Path(folder) / checkpoint.MODEL_FILE
    if not file.is_file():
        raise UsageError(f"{folder} holds no {checkpoint.MODEL_FILE}: name the folder of a saved student")
    with usage_errors():
        document = described(file.read_bytes(), str(file))
    return _behind_model(store, document, folder, document["weights_sha256"], set())


def describe(links: Iterator[Link]) -> str:
    """A line a link."""
    return "\n".join(shown(_describe_data(link) if link["kind"] == "data" else _describe_model(link)) for link in links)


def _behind_data(store: Store, recipe_id: str, dataset: str, met: set[str]) -> Iterator[Link]:
    """Data, the model that made them, and what is behind that; nothing for a recipe that was met before."""
    if recipe_id in met:
        return
    met.add(recipe_id)
    link: Link = {"kind": "data", "recipe": recipe_id, "dataset": dataset}
    recipe = _recipe(store, recipe_id)
    if recipe is None:
        yield link | {"missing": "the recipe is not in this store"}
        return
    yield link | _made(recipe)
    path = f"{paths.weights_folder(recipe.id)}/{checkpoint.MODEL_FILE}"
    found, teacher = store.read(path), recipe.teacher
    with usage_errors():
        document = described(found, f"{store.uri}/{path}") if found else None
    yield from _behind_model(store, document, teacher.uri, teacher.weights_sha256, met)


def _behind_model(
    store: Store, document: Mapping[str, Any] | None, uri: str, sha256: str, met: set[str]
) -> Iterator[Link]:
    """A model, that which it began as, and the data that it was fitted to, each with what is behind it."""
    link = _model(document, uri, sha256)
    yield link
    if document and "init" in link:
        init = document["about"]["init"]
        yield from _behind_model(store, init, init["uri"], init["weights_sha256"], met)
    if "recipe" in link:
        yield from _behind_data(store, link["recipe"], link["dataset"], met)


def _recipe(store: Store, recipe_id: str) -> Recipe | None:
    path = paths.recipe_path(recipe_id)
    return read_document(store, path, Recipe)


def _made(recipe: Recipe) -> Link:
    start = recipe.start.images if isinstance(recipe.start, DataStart) else "prior"
    solver = {"solver": recipe.solver.name, "steps": recipe.num_steps, "grid": recipe.solver.grid["name"]}
    made = {"chain": recipe.chain, "start": start, "seed": recipe.noise.seed}
    return made | {"guidance": recipe.guidance.as_words} | solver


def _model(document: Mapping[str, Any] | None, uri: str, sha256: str) -> Link:
    """A student or a teacher. recipe: what it was fitted to, if that was data of another model; init: what it began as.

    document: its model.json, or what is known of that.
    """
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
    if "init" in about:
        link["init"] = about["init"]["weights_sha256"]
    return link


def _describe_data(link: Link) -> str:
    lead = f"  fitted to {link['dataset'] or 'data'}, recipe {link['recipe'][:12]}"
    if "missing" in link:
        return f"{lead}: {link['missing']}"
    start = "from the prior" if link["start"] == "prior" else f"from {link['start']}"
    guidance = "" if link["guidance"] == "1" else f", guidance {link['guidance']}"
    grid = f"{link['solver']} in {link['steps']} steps, {link['grid']} grid"
    return f"{lead}: {link['chain']} data {start}, {grid}{guidance}, seed {link['seed']}, solved by"


def _describe_model(link: Link) -> str:
    lead = f"{link['weights_sha256'][:12]} {link['uri']}"
    if "missing" in link:
        return f"{lead}: {link['missing']}"
    begun = f", from {link['init'][:12]}" if "init" in link else ""
    if "recipe" not in link:
        first = "a teacher" if begun else "the first teacher"
        return f"{lead}: {first}" + (f", fitted to {link['images']}" if "images" in link else "") + begun
    objective = link.get("objective", {}).get("name", "a student")
    serves = ", ".join(map(str, link["serves"])) + (" step" if link["serves"] == [1] else " steps")
    fitted_to = f" to recipe {link['recipe'][:12]}" if begun else ""
    return f"{lead}: {objective}, serves {serves}, {_fitted(link)}{fitted_to}{begun}"


def _fitted(link: Link) -> str:
    return f"fitted for {link.get('steps', '?')} steps of {link.get('batch_size', '?')} samples"
