"""Who solves, audits or starts a student takes a teacher only if weights, code and description are the recipe's."""

from dataclasses import replace

import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.producer import Producer, WorkOrder
from limbeck.pipeline.recipe import build_layout, build_recipe
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.store import Store

OTHERS = {
    "description": {"model": {"kind": "gaussian", "sample_shape": [2], "num_classes": None, "mean": 1.5}},
    "weights": {"weights_sha256": "0" * 64},
    "source code": {"source_sha256": "1" * 64},
}


def produce(order, uri):
    Producer(order)


def audit(order, uri):
    TeacherSource(order.store, order.recipe, uri).load()


def train(order, uri):
    TeacherSource(order.store, order.recipe, uri).checkpoint()


@pytest.mark.parametrize(("use", "error"), [(produce, UserError), (audit, NoTeacher), (train, NoTeacher)])
@pytest.mark.parametrize("what", OTHERS)
def test_a_teacher_that_differs_in_one_of_them_is_refused(tmp_path, use, error, what):
    uri = "builtin:gaussian"
    teacher = load_teacher(uri)
    config = GenerateConfig(teacher=uri, store=str(tmp_path), count=64, samples_per_shard=64, micro_batch=64)
    recipe = build_recipe(config, teacher)
    layout, store = build_layout(config, recipe), Store.create(str(tmp_path))
    use(WorkOrder(store, recipe, layout, "cpu", 1), uri)
    other = build_recipe(config, replace(teacher, **OTHERS[what]))
    with pytest.raises(error, match=rf"^builtin:gaussian has {what} \w+, the recipe says \w+[:;]"):
        use(WorkOrder(store, other, layout, "cpu", 1), uri)
