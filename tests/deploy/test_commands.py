"""Every command of ours in deploy/ parses: a renamed flag breaks the build, not somebody's night."""

import json
import re

import jsonschema
import pytest
import ray
import yaml

from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.program import COMMANDS
from tests.deploy.kubectl import find
from tests.deploy.manifests import DEPLOY, OVERLAYS, ROOT, command_lines, objects, rendered
from tests.deploy.our_commands import our_commands, parse_ours

MANIFESTS = {name: document for name, document in objects().items() if "spec" in document}
SCRIPTS = sorted(DEPLOY.glob("slurm/*.sbatch"))
LAUNCHER = yaml.safe_load((DEPLOY / "aws" / "cluster.yaml").read_text())
README = (DEPLOY / "README.md").read_text()
README_COMMANDS = our_commands("\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)))
CONFIGS = {"generate": ("generate", "regenerate"), "prune": ("prune",), "fit": ("fit",)}


def commands_of(document):
    return [command for line in command_lines(document) for command in our_commands(line)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifests_commands_parse(name):
    for words in commands_of(MANIFESTS[name]):
        parse_ours(words)


def test_the_manifests_run_each_command_that_they_are_for():
    run = [words for document in MANIFESTS.values() for words in commands_of(document)]
    assert {words[0] for words in run} == {"generate", "submit", "regenerate", "prune", "fit"}


@pytest.mark.skipif(find() is None, reason="no kubectl: python -m tests.deploy.kubectl installs it")
@pytest.mark.parametrize("overlay", [path for path in OVERLAYS if path.name != "teacher"], ids=lambda path: path.name)
def test_an_overlays_commands_parse_with_its_own_config(overlay, tmp_path):
    documents = rendered(overlay)
    (config,) = (document for document in documents if document["kind"] == "ConfigMap")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    found = [command for document in documents if "spec" in document for command in commands_of(document)]
    assert found
    for words in found:
        parse_ours(words, mounted=tmp_path)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (path, command)
        for stem, names in CONFIGS.items()
        for path in sorted(DEPLOY.rglob(f"{stem}.yaml"))
        if "kind" not in yaml.safe_load(path.read_text())
        for command in names
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.relative_to(DEPLOY)),
)
def test_a_config_file_is_one_of_its_commands(path, command):
    parse(COMMANDS[command].config, ["--config", str(path)], program=command)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_slurm_scripts_commands_parse(path):
    found = our_commands(path.read_text())
    assert len(found) == 1
    for words in found:
        parse_ours(words)


@pytest.mark.parametrize("words", README_COMMANDS, ids=lambda words: " ".join(words)[:40])
def test_the_readmes_commands_parse(words):
    parse_ours(words)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_a_file_that_the_readme_names_is_there(path):
    assert (DEPLOY / path).exists()


@pytest.mark.parametrize("folder", re.findall(r"-k deploy/(\S+)", README))
def test_an_overlay_that_the_readme_applies_is_there(folder):
    assert (DEPLOY / folder / "kustomization.yaml").exists()


def test_a_renamed_flag_is_noticed():
    (words,) = our_commands(MANIFESTS["generate/rayjob.yaml#0"]["spec"]["entrypoint"] + " --no-such-flag 1")
    with pytest.raises(UsageError, match="no-such-flag"):
        parse_ours(words)


def test_ray_knows_the_launchers_every_field():
    schema = json.loads((ROOT / ray.__path__[0] / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(LAUNCHER)
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        jsonschema.Draft7Validator(schema).validate({**LAUNCHER, "max_wrokers": 8})


def test_the_launchers_workers_are_as_many_as_its_config_asks_for():
    config = yaml.safe_load((DEPLOY / "aws" / "generate.yaml").read_text())
    workers = LAUNCHER["available_node_types"]["spot-gpu"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["workers"] * config["ray"]["num_gpus"] == workers["max_workers"] * workers["resources"]["GPU"]
    assert config["drain_seconds"] < 120
