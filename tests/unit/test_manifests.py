"""What k8s/ and cluster/ hand to Kubernetes and to Ray's launcher, checked without either."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from burnish.config import load

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
CRDS = Path(os.environ.get("KUBERAY_CRD_DIR", ROOT.parent / "shared" / "kuberay"))
KUSTOMIZATIONS = sorted(path.parent.relative_to(K8S).as_posix() for path in K8S.rglob("kustomization.yaml"))
WITH_RAY = ["base", "overlays/cpu"]
GPU = "nvidia.com/gpu"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)


@cache
def rendered(name: str) -> list[dict[str, Any]]:
    result = build(K8S / name)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


def of_kind(name: str, *kinds: str) -> list[dict[str, Any]]:
    return [each for each in rendered(name) if each["kind"] in kinds]


def clusters(name: str) -> list[dict[str, Any]]:
    """The cluster specs of RayJobs and RayClusters."""
    return [each["spec"].get("rayClusterSpec", each["spec"]) for each in of_kind(name, "RayJob", "RayCluster")]


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and value of a tree with its dotted path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield f"{path}.{key}", value
        yield from nodes(value, f"{path}.{key}")


def pods(name: str) -> list[dict[str, Any]]:
    """Every pod spec: of Ray groups, submitters and Deployments."""
    return [
        value for each in rendered(name) for path, value in nodes(each) if isinstance(value, dict) and "containers" in value
    ]


def containers(name: str) -> list[dict[str, Any]]:
    return [each for pod in pods(name) for each in pod["containers"] + pod.get("initContainers", [])]


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


def references(name: str) -> set[tuple[str, str]]:
    """Kind and name of every object that a rendered object names."""
    found = set()
    for path, value in (pair for each in rendered(name) for pair in nodes(each)):
        match path.rsplit(".", 1)[-1], value:
            case ("configMap" | "configMapKeyRef" | "configMapRef", {"name": str(target)}):
                found.add(("ConfigMap", target))
            case ("secretKeyRef" | "secretRef", {"name": str(target)}):
                found.add(("Secret", target))
            case ("secretName", str(target)):
                found.add(("Secret", target))
            case ("serviceAccountName", str(target)):
                found.add(("ServiceAccount", target))
            case ("claimName", str(target)):
                found.add(("PersistentVolumeClaim", target))
    return found


def recipe_of(name: str, tmp_path: Path) -> Any:
    """The recipe that the RayJob mounts, through the names as they are after the render."""
    [job] = of_kind(name, "RayJob")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [volume] = [each for each in head["volumes"] if "configMap" in each]
    [mount] = [each for each in head["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
    [config] = [each for each in of_kind(name, "ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"]]
    _, script, recipe = job["spec"]["entrypoint"].split()
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    file = tmp_path / "recipe.yaml"
    file.write_text(config["data"][Path(recipe).relative_to(mount["mountPath"]).as_posix()])
    return load(file)


def test_there_are_kustomizations() -> None:
    assert {*WITH_RAY, "mlflow"} <= set(KUSTOMIZATIONS)


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_kustomization_renders_into_the_namespace(name: str) -> None:
    objects = rendered(name)
    assert objects
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"} == {"burnish"}


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_objects_of_ray_fit_the_schema_of_their_kind(name: str) -> None:
    objects = of_kind(name, "RayJob", "RayCluster")
    assert len(objects) == 2
    for each in objects:
        path = CRDS / f"{each['kind']}.v1.strict.json"
        if not path.is_file():
            pytest.skip(f"{path} is not here")
        validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
        assert [error.message for error in validator.iter_errors(each)] == []
        broken = copy.deepcopy(each)
        broken["spec"].get("rayClusterSpec", broken["spec"])["workerGroupSpecs"][0]["lables"] = {}
        assert not validator.is_valid(broken)


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_a_cluster_has_a_data_group_and_a_training_group_with_their_labels(name: str) -> None:
    for cluster in clusters(name):
        groups = {each["groupName"]: each for each in cluster["workerGroupSpecs"]}
        assert {key: each["labels"]["node-role"] for key, each in groups.items()} == {
            "cpu-data": "data",
            "gpu-train": "train",
        }
        assert all(each["minReplicas"] == 0 < each["maxReplicas"] for each in groups.values())
        assert all(each["template"]["spec"]["containers"] for each in groups.values())
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_the_job_and_the_standing_cluster_have_the_same_spec(name: str) -> None:
    first, second = clusters(name)
    assert first == second


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_a_training_pod_requests_what_it_is_limited_to(name: str) -> None:
    for cluster in clusters(name):
        for group in cluster["workerGroupSpecs"]:
            for each in group["template"]["spec"]["containers"]:
                assert each["resources"]["requests"] == each["resources"]["limits"]


@needs_kubectl
def test_the_cpu_overlay_asks_for_no_gpu_and_base_does(tmp_path: Path) -> None:
    assert any(GPU in each["resources"]["limits"] for each in containers("base"))
    assert not [path for each in rendered("overlays/cpu") for path, value in nodes(each) if "nvidia" in f"{path} {value}"]
    assert recipe_of("overlays/cpu", tmp_path).scale.use_gpu is False


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_image_has_the_tag_of_the_pinned_release(name: str) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    tags = {"burnish": f"{version.group(1)}-ray{pinned('ray')}", "burnish-mlflow": pinned("mlflow")}
    for each in containers(name):
        image, _, tag = each["image"].rpartition(":")
        assert tag == tags[image.rsplit("/", 1)[-1]], each["image"]
    assert {cluster["rayVersion"] for cluster in clusters(name)} <= {pinned("ray")}


@pytest.mark.parametrize("name", ["Dockerfile", "aws.yaml", "gcp.yaml"])
def test_every_ray_image_of_the_cluster_folder_is_the_pinned_release(name: str) -> None:
    text = (ROOT / "cluster" / name).read_text()
    assert set(re.findall(r"rayproject/ray:(\S+?)-py311-gpu", text)) == {pinned("ray")}
    assert ":latest" not in text


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_everything_that_is_named_is_rendered_or_a_documented_secret(name: str) -> None:
    here = {(each["kind"], each["metadata"]["name"]) for each in rendered(name)}
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", (K8S / "README.md").read_text(), re.MULTILINE))
    missing = {(kind, target) for kind, target in references(name) - here if kind != "Secret" or target not in documented}
    assert references(name)
    assert missing == set()


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_no_secret_stands_in_a_manifest(name: str) -> None:
    assert of_kind(name, "Secret") == []
    for each in containers(name):
        for variable in each.get("env", []):
            if re.search(r"PASSWORD|TOKEN|SECRET|_KEY|STORE_URI", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    text = "".join(path.read_text() for path in K8S.rglob("*.yaml"))
    assert not re.search(r"://[^/\s:]+:[^/\s@]+@|hf_[A-Za-z0-9]{20}|AKIA[A-Z0-9]{16}", text)


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_no_field_is_set_that_the_operator_refuses_or_that_keeps_a_stopped_cluster(name: str) -> None:
    for each in of_kind(name, "RayJob", "RayCluster"):
        fields = {path.rsplit(".", 1)[-1] for path, _ in nodes(each)}
        assert not fields & {
            "deletionStrategy",
            "networkPolicy",
            "tlsOptions",
            "jobId",
            "enableK8sTokenAuth",
            "upgradeStrategy",
        }
    [job] = of_kind(name, "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", job["metadata"]["name"])
    assert all(cluster["authOptions"] == {"mode": "token", "secretName": "ray-auth"} for cluster in clusters(name))


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_a_job_has_time_to_write_a_checkpoint_when_it_is_stopped(name: str) -> None:
    [job] = of_kind(name, "RayJob")
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    with_ray = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["env_vars"]
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == with_ray["RAY_JOB_STOP_WAIT_TIME_S"]
    for cluster in clusters(name):
        [train] = [each for each in cluster["workerGroupSpecs"] if each["groupName"] == "gpu-train"]
        grace = train["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= int(environment["RAY_JOB_STOP_WAIT_TIME_S"])


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_disruption_budgets_hold_every_head_and_every_training_pod(name: str) -> None:
    most: dict[str, int] = {}
    for cluster in clusters(name):
        head = cluster["headGroupSpec"] | {"maxReplicas": 1}
        for group in [head, *cluster["workerGroupSpecs"]]:
            role = group["template"]["metadata"]["labels"]["burnish.dev/role"]
            most[role] = most.get(role, 0) + group["maxReplicas"]
    budgets = {}
    for each in of_kind(name, "PodDisruptionBudget"):
        assert "maxUnavailable" not in each["spec"]
        assert type(each["spec"]["minAvailable"]) is int
        budgets[each["spec"]["selector"]["matchLabels"]["burnish.dev/role"]] = each["spec"]["minAvailable"]
    assert set(budgets) == {"head", "train"}
    assert all(least >= most[role] for role, least in budgets.items())


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_no_container_can_become_root(name: str) -> None:
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in containers(name):
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_traffic_is_denied_unless_a_policy_names_it(name: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(name, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for spec in policies.values():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), "an ingress rule without `from` opens the pod to everyone"


@needs_kubectl
@pytest.mark.parametrize("name", WITH_RAY)
def test_the_mounted_recipe_is_valid_and_keeps_everything_on_the_shared_volume(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    paths = [recipe.model.path, recipe.checkpoint.storage, *(each.path for each in recipe.data.train + recipe.data.eval)]
    assert all(path.startswith("/shared/") for path in paths)
    for cluster in clusters(name):
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
            assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]
        [train] = [each for each in cluster["workerGroupSpecs"] if each["groupName"] == "gpu-train"]
        limits = train["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits.get(GPU, limits["cpu"])) * train["maxReplicas"] >= recipe.scale.num_workers
    # Before the first GPU node `auto` would see none.
    assert isinstance(recipe.scale.use_gpu, bool)


@needs_kubectl
def test_a_patch_with_a_wrong_index_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    patch = tmp_path / "k8s/overlays/cpu/rayjob.yaml"
    text = patch.read_text()
    assert build(patch.parent).returncode == 0
    patch.write_text(
        text.replace("workerGroupSpecs/0/", "workerGroupSpecs/9/").replace("workerGroupSpecs/1/", "workerGroupSpecs/0/")
    )
    assert build(patch.parent).returncode != 0
    patch.write_text(text.replace("workerGroupSpecs/1/", "workerGroupSpecs/0/"))
    wrong = build(patch.parent)
    assert wrong.returncode != 0
    assert "test" in wrong.stderr.lower()


def test_every_json_patch_is_guarded_by_a_test() -> None:
    for overlay in K8S.glob("overlays/*/kustomization.yaml"):
        for entry in yaml.safe_load(overlay.read_text())["patches"]:
            operations = yaml.safe_load((overlay.parent / entry["path"]).read_text())
            assert isinstance(operations, list), "a strategic merge patch loses worker groups"
            guarded = {each["path"].rsplit("/", 1)[0] for each in operations if each["op"] == "test"}
            for each in operations:
                indexed = re.match(r".*?/\d+(?=/|$)", each["path"])
                assert indexed is None or any(indexed[0].startswith(path) for path in guarded), each["path"]


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_accepts_a_launcher_file_and_refuses_a_typo_in_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher(name)))
    broken = launcher(name)
    broken["available_node_types"]["data"]["lables"] = broken["available_node_types"]["data"].pop("labels")
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_launched_cluster_is_closed_and_has_the_groups_of_the_manifests(name: str) -> None:
    config = launcher(name)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert {key: each["labels"]["node-role"] for key, each in types.items() if "labels" in each} == {
        "data": "data",
        "train": "train",
    }
    assert types["data"]["min_workers"] == types["train"]["min_workers"] == 0
    assert types["train"]["resources"]["GPU"] > 0
    assert "GPU" not in types["data"]["resources"]
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert any("pip install -c constraints.txt ." in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_every_node_of_a_launched_cluster_asks_for_the_token_of_the_person_who_starts_it(name: str) -> None:
    config = launcher(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    # Ray reads the token there (authentication_token_setup.py); in the file itself it would be in every copy of it.
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    text = (ROOT / "cluster" / name).read_text()
    assert "RAY_AUTH_TOKEN" not in text and not re.search(r"[0-9a-f]{32}", text)


@pytest.mark.parametrize(("mode", "expected"), [(None, "token 64"), ("disabled", "disabled 0")])
def test_a_cluster_on_this_machine_has_a_token_of_its_own(mode: str | None, expected: str) -> None:
    code = (
        "import os, runpy; runpy.run_path('cluster/local.py', run_name='read'); "
        "print(os.environ['RAY_AUTH_MODE'], len(os.environ.get('RAY_AUTH_TOKEN', '')))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": mode} if mode else {}
    read = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert read.stdout.strip() == expected
