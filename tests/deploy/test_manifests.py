"""Every manifest against the schemas of what will read it, and what the manifests promise each other."""

import json
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from limbeck.pipeline.workers.ray_runner import _Worker
from limbeck.trainer.config import FitConfig
from tests.deploy.kubectl import find
from tests.deploy.manifests import (
    CONFIG,
    DEPLOY,
    KUBERAY,
    OVERLAYS,
    SCHEMAS,
    containers,
    crd_schema,
    objects,
    pods,
    rendered,
)

OBJECTS = objects()
CORE = {name: document for name, document in OBJECTS.items() if document["kind"] not in KUBERAY}
RAY = {name: document for name, document in OBJECTS.items() if document["kind"] in KUBERAY}
KUBERNETES_VERSIONS = ("1.31", "1.37")
SECRETS = {"limbeck-store", "limbeck-ray-token"}

needs_kubectl = pytest.mark.skipif(find() is None, reason="no kubectl: python -m tests.deploy.kubectl installs it")
needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="KubeRay's CRD schemas are not at ../shared/schemas beside the repository"
)


def validate(document):
    """Raises where Kubernetes or KubeRay does not know a field, or knows it as something else."""
    if document["kind"] not in KUBERAY:
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    elif SCHEMAS.is_dir():
        jsonschema.Draft7Validator(crd_schema(document["kind"])).validate(document)


def cluster_spec(document):
    """The RayClusterSpec of a RayCluster or of a job that brings its own."""
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def ray_pods(document):
    """The head's pod template, and each worker group's."""
    spec = cluster_spec(document)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", CORE)
def test_kubernetes_knows_every_field(name):
    validate(CORE[name])


@needs_schemas
@pytest.mark.parametrize("name", RAY)
def test_kuberay_knows_every_field(name):
    validate(RAY[name])


def test_every_kind_that_we_promise_is_there():
    kinds = {document["kind"] for document in OBJECTS.values()}
    assert kinds >= {*KUBERAY, "CronJob", "Job", "Service", "PersistentVolumeClaim"}


def test_a_misspelt_core_field_is_refused():
    wrong = json.loads(json.dumps(CORE["nightly/regenerate.yaml#0"]))
    wrong["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        validate(wrong)


@needs_schemas
@pytest.mark.parametrize("kind", KUBERAY)
def test_a_misspelt_field_of_kuberay_is_refused(kind):
    (wrong, *_) = (json.loads(json.dumps(document)) for document in RAY.values() if document["kind"] == kind)
    wrong["spec"]["rayVersoin"] = "2.60.0"
    with pytest.raises(jsonschema.ValidationError, match="rayVersoin"):
        validate(wrong)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_renders_to_valid_documents(overlay):
    documents = rendered(overlay)
    for document in documents:
        validate(document)
    images = [container["image"] for document in documents for container in containers(document)]
    assert all(image.startswith("registry.example.com/limbeck-") for image in images), images
    assert {document["metadata"]["namespace"] for document in documents} == {"limbeck"}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_what_an_overlays_pods_name_is_there(overlay):
    documents = rendered(overlay)
    have = {(document["kind"], document["metadata"]["name"]) for document in documents}
    volumes = [volume for document in documents for pod in pods(document) for volume in pod.get("volumes", [])]
    maps = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    assert {("ConfigMap", name) for name in maps} <= have
    # The teacher's volume is the user's own; README.md says how to make it.
    assert {("PersistentVolumeClaim", name) for name in claims - {"limbeck-teacher"}} <= have


@needs_kubectl
def test_overlays_that_stand_side_by_side_change_nothing_of_each_other():
    """What kubectl applies or deletes with one is no other's; generate and nightly share a ConfigMap of one content."""

    def named(overlay):
        return {(one["kind"], one["metadata"]["name"]): one for one in rendered(OVERLAYS[0].parent / overlay)}

    demo, spot, nightly, trainer = map(named, ("demo-cpu", "spot-gpu", "nightly", "trainer"))
    assert not demo.keys() & (spot.keys() | nightly.keys() | trainer.keys())
    assert not trainer.keys() & (spot.keys() | nightly.keys())
    assert spot.keys() & nightly.keys() == {("ConfigMap", "limbeck-config")}
    assert spot["ConfigMap", "limbeck-config"] == nightly["ConfigMap", "limbeck-config"]


@needs_kubectl
def test_a_queued_job_is_as_kueue_and_kuberay_want_it():
    (job,) = (document for document in rendered(OVERLAYS[0].parent / "queued") if document["kind"] == "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "limbeck"
    assert job["spec"]["suspend"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("name", OBJECTS)
def test_images_are_pinned(name):
    for container in containers(OBJECTS[name]):
        assert re.fullmatch(r"limbeck-(pipeline|trainer):\d+\.\d+\.\d+-(cpu|cuda)", container["image"])


@pytest.mark.parametrize("name", OBJECTS)
def test_pods_have_no_rights_that_they_do_not_need(name):
    for pod in pods(OBJECTS[name]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        # Only the head's autoscaler talks to Kubernetes.
        assert pod["containers"][0]["name"] == "ray-head" or pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OBJECTS)
def test_pods_say_what_they_take(name):
    for container in containers(OBJECTS[name]):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= requests.keys()
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


@pytest.mark.parametrize("name", OBJECTS)
def test_secrets_come_by_reference(name):
    assert OBJECTS[name]["kind"] != "Secret"
    for container in containers(OBJECTS[name]):
        named = {source["secretRef"]["name"] for source in container.get("envFrom", [])}
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            named |= {reference["name"]} if reference else set()
            assert reference or not re.search(r"TOKEN|SECRET|PASSWORD|_KEY", variable["name"])
        assert named <= SECRETS


def test_no_file_of_deploy_holds_a_secret():
    for path in DEPLOY.rglob("*"):
        text = path.read_text() if path.is_file() else ""
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s]+:[^/\s]+@", text), path


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_ray_takes_only_who_holds_the_token(name):
    assert cluster_spec(RAY[name])["authOptions"] == {"mode": "token", "secretName": "limbeck-ray-token"}


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_the_drain_fits_into_the_grace(name):
    """preStop waits as long as the driver drains, Ray stops, and Kubernetes kills only after both."""
    drain = yaml.safe_load((CONFIG / "generate.yaml").read_text())["drain_seconds"]
    for pod in ray_pods(RAY[name]):
        script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        waits = int(re.search(r"timeout (\d+)", script)[1])
        stops = int(re.search(r"ray stop --grace-period (\d+)", script)[1])
        assert drain < waits
        assert waits + stops + 10 <= pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_ray_gives_a_driver_that_is_told_to_end_its_time(name):
    """`ray job stop` and KubeRay's own kill after RAY_JOB_STOP_WAIT_TIME_S, by default 3 s."""
    drain = yaml.safe_load((CONFIG / "generate.yaml").read_text())["drain_seconds"]
    head = ray_pods(RAY[name])[0]["containers"][0]
    env = {variable["name"]: variable["value"] for variable in head["env"]}
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) > drain


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_a_workers_pod_waits_for_our_actor_under_its_name(name):
    script = ray_pods(RAY[name])[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert f"pgrep -f '^ray::{_Worker.__name__}'" in script


def test_the_jobs_cluster_is_the_standing_ones_twin():
    assert cluster_spec(RAY["generate/rayjob.yaml#0"]) == cluster_spec(RAY["nightly/raycluster.yaml#0"])


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_the_configured_workers_fit_on_the_cluster(name):
    config = yaml.safe_load((CONFIG / "generate.yaml").read_text())
    (group,) = cluster_spec(RAY[name])["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    ray = config["ray"]
    per_pod = min(int(limits["nvidia.com/gpu"]) // ray["num_gpus"], int(limits["cpu"]) // ray["num_cpus"])
    assert group["minReplicas"] == 0
    assert config["workers"] == per_pod * group["maxReplicas"]


@pytest.mark.parametrize("name", [name for name in RAY if "cronjob" not in name])
def test_the_images_ray_is_the_clusters(name):
    pinned = (DEPLOY / "containers" / "constraints.txt").read_text()
    assert f"ray=={cluster_spec(RAY[name])['rayVersion']}\n" in pinned


def test_kuberay_takes_a_scheduled_job_on_a_standing_cluster():
    """What its controller refuses, though its schema does not: see ValidateRayJobSpec of KubeRay 1.6 and later."""
    template = RAY["overlays/nightly-raycronjob/raycronjob.yaml#0"]["spec"]["jobTemplate"]
    assert template["clusterSelector"] == {"ray.io/cluster": RAY["nightly/raycluster.yaml#0"]["metadata"]["name"]}
    refused = {"backoffLimit", "ttlSecondsAfterFinished", "suspend", "shutdownAfterJobFinishes", "rayClusterSpec"}
    assert not refused & template.keys()


@pytest.mark.parametrize("name", [name for name, document in CORE.items() if document["kind"] == "CronJob"])
def test_a_schedule_does_not_overlap_itself(name):
    spec = CORE[name]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] < 24 * 3600
    assert spec["timeZone"] == "Etc/UTC"


def trainer(overlay):
    """Its documents by kind, its torchrun's options, its pod and its fit's config."""
    documents = {document["kind"]: document for document in rendered(OVERLAYS[0].parent / overlay)}
    (pod,) = pods(documents["Job"])
    options = dict(word.lstrip("-").split("=", 1) for word in pod["containers"][0]["args"] if "=" in word)
    return documents, options, pod, yaml.safe_load(documents["ConfigMap"]["data"]["fit.yaml"])


@needs_kubectl
def test_the_trainers_nodes_meet_where_the_service_says():
    documents, options, pod, _ = trainer("trainer-nodes")
    job, service = documents["Job"], documents["Service"]
    spec, name = job["spec"], service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    fewest, most = map(int, options["nnodes"].split(":"))
    assert fewest == 1
    assert spec["completions"] == spec["parallelism"] == most
    assert int(options["max-restarts"]) > 0
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in pod["containers"][0]["env"]
    assert not spec.get("suspend")
    assert pod["subdomain"] == name
    port = service["spec"]["ports"][0]["port"]
    assert options["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{name}:{port}"
    assert service["spec"]["clusterIP"] == "None"
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


@needs_kubectl
@pytest.mark.parametrize("overlay", ["trainer", "trainer-nodes"])
def test_a_trainers_processes_are_its_gpus_and_divide_the_batch(overlay):
    documents, options, pod, fit = trainer(overlay)
    assert options["nproc-per-node"] == "gpu"
    gpus = int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    config = FitConfig(**fit)
    for nodes in range(1, documents["Job"]["spec"].get("completions", 1) + 1):
        assert config.batch.num_lanes % (nodes * gpus) == 0


@needs_kubectl
@pytest.mark.parametrize("overlay", ["trainer", "trainer-nodes"])
def test_a_trainer_saves_within_its_grace_where_every_node_reaches(overlay):
    _, options, pod, fit = trainer(overlay)
    assert int(options["shutdown-timeout"]) + 10 <= pod["terminationGracePeriodSeconds"]
    assert fit["checkpoints"].startswith("s3://")


@needs_kubectl
@pytest.mark.parametrize("overlay", ["trainer", "trainer-nodes"])
def test_a_trainers_cache_fits_into_its_volume(overlay):
    documents, _, pod, fit = trainer(overlay)
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    (volume,) = (one for one in pod["volumes"] if one["name"] == mounts[f"/{fit['cache_folder'].split('/')[1]}"])
    size = (
        volume["emptyDir"]["sizeLimit"]
        if "emptyDir" in volume
        else documents["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    )
    assert fit["cache_gib"] + 10 <= int(size.removesuffix("Gi"))
