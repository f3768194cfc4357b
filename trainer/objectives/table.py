"""Every objective by name: what `fit --objective.name` takes. A new one is its file and its row here."""

from typing import Any

from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.trainer.objectives import (
    consistency,
    ctm,
    denoising,
    dmd,
    flow_map,
    knowledge,
    progressive,
    reflow,
    sid,
    vsd,
)
from limbeck.trainer.objectives.kind import Given, Kind, Options, Stage

OBJECTIVES: dict[str, Kind[Any]] = {
    "knowledge": knowledge.KIND,
    "progressive": progressive.KIND,
    "flow_map": flow_map.KIND,
    "ctm": ctm.KIND,
    "consistency": consistency.KIND,
    "reflow": reflow.KIND,
    "dmd": dmd.KIND,
    "vsd": vsd.KIND,
    "sid": sid.KIND,
    "denoising": denoising.KIND,
}

WITH_CRITIC = ", ".join(name for name, kind in OBJECTIVES.items() if kind.has_critic)
"""For help texts."""


def make_stages(kind: Kind[Any], options: Options, given: Given) -> tuple[Stage, ...]:
    """The stages of an objective. ManifestMismatch where the dataset lacks states, or holds other chains."""
    if given.dataset and given.dataset.recipe.chain == "segment" and not kind.reads_segments:
        raise ManifestMismatch(progressive.segments_serve(given.dataset))
    return kind.stages(options, given)
