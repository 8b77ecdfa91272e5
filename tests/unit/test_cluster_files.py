"""The files that a cluster is started and fed with, by the checks of those who read them."""

import copy
import functools
import gzip
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from cryptography import x509

ROOT = Path(__file__).parents[2]
LAUNCHED = ("cluster.yaml", "configs/cluster-local.yaml")

# The schemas of ray.io/v1 in KubeRay 1.7.0 (ray-operator/config/crd/bases, Apache-2.0), by kind.
KUBERAY: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "kuberay-1.7.0.json.gz").read_bytes()))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def check_cluster(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_cluster_file_passes_the_launchers_own_check():
    prepared = check_cluster(read("cluster.yaml"))
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != "head"}
    assert any(kind["resources"].get("GPU") for kind in workers.values())
    assert any(kind["resources"].get("decode") and "GPU" not in kind["resources"] for kind in workers.values())
    spot = {"MarketType": "spot"}
    assert any(kind["node_config"].get("InstanceMarketOptions") == spot for kind in workers.values())
    assert all(kind["min_workers"] < kind["max_workers"] for kind in workers.values()), "autoscaled"


def test_instances_are_started_with_what_ec2_knows_and_with_its_second_metadata_service():
    """By the parameters of RunInstances, as AWS's own library has them."""
    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in read("cluster.yaml")["available_node_types"].values():
        instance = kind["node_config"]
        report = ParamValidator().validate({**instance, "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver")
        assert all(disk["Ebs"]["Encrypted"] for disk in instance["BlockDeviceMappings"])


def test_containers_of_gpu_nodes_get_their_gpus_and_others_do_not_ask_for_any():
    cluster = check_cluster(read("cluster.yaml"))
    assert cluster["docker"]["disable_automatic_runtime_detection"], "or the options would stand there twice"
    for name, kind in cluster["available_node_types"].items():
        own = {**cluster["docker"], **kind.get("docker", {})}  # as the launcher has it
        image = own.get("worker_image", own["image"])
        asks = "--gpus all" in own.get("worker_run_options", [])
        assert asks == image.endswith("-gpu") == bool(kind["resources"].get("GPU")), name


def test_training_can_be_kept_off_nodes_that_go_and_that_decode():
    for name in ("cluster.yaml", "configs/kuberay.yaml"):
        if name == "cluster.yaml":
            kinds = {
                kind: {"resources": values["resources"]} for kind, values in read(name)["available_node_types"].items()
            }
            spot = {
                kind
                for kind, values in read(name)["available_node_types"].items()
                if "InstanceMarketOptions" in values["node_config"]
            }
        else:
            groups = read(name)["items"][0]["spec"]["workerGroupSpecs"]
            kinds = {
                group["groupName"]: {"resources": json.loads(shlex.split(group["rayStartParams"]["resources"])[0])}
                for group in groups
            }
            spot = {group["groupName"] for group in groups if "nodeSelector" in group["template"]["spec"]}
        training = {kind for kind, values in kinds.items() if values["resources"].get("train")}
        assert training == {"gpu"}
        assert not training & spot
        assert {kind for kind, values in kinds.items() if values["resources"].get("spot")} == {"gpu-spot"}


def test_file_of_local_hosts_passes_it_too():
    prepared = check_cluster(read("configs/cluster-local.yaml"))
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (2, 2), "all hosts, always"


def test_the_launchers_check_refuses_what_it_should():
    cluster = read("cluster.yaml")
    with pytest.raises(jsonschema.ValidationError, match="worker_start_commands"):
        check_cluster({**cluster, "worker_start_commands": ["ray start"]})
    with pytest.raises(ValueError, match="head_node_type"):
        check_cluster({**cluster, "head_node_type": "none"})


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_a_token_speaks_tls_and_sends_no_telemetry(name: str):
    cluster = read(name)
    settings = (
        "RAY_AUTH_MODE=token",
        "RAY_USAGE_STATS_ENABLED=0",
        "RAY_USE_TLS=1",
        "RAY_TLS_CA_CERT=$HOME/.ray/tls/ca.crt",
    )
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[key] if "ray start" in command]
        before, _, after = start.partition("ray start")
        assert set(settings) <= set(before.split())
        assert "RAY_TLS_SERVER_CERT=$HOME/.ray/tls/node.crt RAY_TLS_SERVER_KEY=$HOME/.ray/tls/node.key" in before
        assert "--metrics-export-port=8080" in after
        assert "--dashboard-host=127.0.0.1" in after or "--head" not in after
    assert {"~/.ray/auth_token", "~/.ray/tls/ca.crt", "~/.ray/tls/ca.key"} <= set(cluster["file_mounts"].values())


def test_the_cloud_lets_in_nothing_but_ssh_from_one_network():
    cluster = read("cluster.yaml")
    for permission in cluster["provider"]["security_group"]["IpPermissions"]:
        assert permission["ToPort"] == 22
        assert all(network["CidrIp"] != "0.0.0.0/0" for network in permission["IpRanges"])


def test_cluster_files_hold_no_secret():
    for name in (
        *LAUNCHED,
        "configs/kuberay.yaml",
        "configs/runtime_env.yaml",
        "configs/mlflow-server.env",
        "serving/config.yaml",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        secret = r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|(?i:secret|password|token)\s*[:=]\s*['\"]?[0-9a-f]{8}"
        assert not re.search(secret, text)


def test_nodes_have_the_ray_and_the_python_of_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ray_version = next(re.findall(r"==(\S+)$", line)[0] for line in project["dependencies"] if line.startswith("ray["))
    minor = re.findall(r">=3\.(\d+)", project["requires-python"])[0]
    assert f"ray:{ray_version}-py3{minor}" in read("cluster.yaml")["docker"]["image"]
    pods = read("configs/kuberay.yaml")["items"]
    assert {item["spec"].get("rayVersion", ray_version) for item in pods} == {ray_version}
    lock = (ROOT / "requirements-gpu.lock").read_text(encoding="utf-8")
    assert f"\nray=={ray_version} " in lock
    assert read("cluster.yaml")["file_mounts"]["/home/ray/requirements-gpu.lock"] == "requirements-gpu.lock"


def test_serve_config_is_what_serve_takes_and_names_our_deployments():
    from ray.serve.schema import ServeDeploySchema

    from rayseg import config
    from serving.app import APP_NAME, ServeConfig
    from serving.ingress import Ingress
    from serving.replica import Model

    schema = ServeDeploySchema.model_validate(read("serving/config.yaml"))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.logging_config is not None
    assert not schema.logging_config.enable_access_log
    (application,) = schema.applications
    assert (application.name, application.import_path) == (APP_NAME, "serving.app:application")
    assert config.build(ServeConfig, application.args).max_queue == 512
    assert {deployment.name for deployment in application.deployments} <= {Ingress.name, Model.name}


def certified(folder: Path, command: str, **environment: str) -> x509.Certificate:
    """What a command that certifies a node makes, once its signature is found to be the authority's.

    The authority comes from the command in the first lines of cluster.yaml.
    """
    first_lines = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    (authority,) = re.findall(r"^#   (openssl req -x509 .*)$", first_lines, re.MULTILINE)
    made = folder / ".ray" / "tls"
    made.mkdir(parents=True)
    for one in (authority, command):
        home = {"HOME": str(folder), "PATH": os.environ["PATH"], **environment}
        subprocess.run(["sh", "-e", "-c", one], cwd=made, env=home, check=True, capture_output=True)
    certificate, root = (x509.load_pem_x509_certificate((made / name).read_bytes()) for name in ("node.crt", "ca.crt"))
    certificate.verify_directly_issued_by(root)
    assert (made / "node.key").stat().st_mode & 0o077 == 0
    return certificate


def addresses(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(map(str, names.get_values_for_type(x509.IPAddress)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_node_gets_a_certificate_of_its_addresses(name: str, tmp_path: Path):
    (command,) = [command for command in read(name)["setup_commands"] if "openssl x509" in command]
    own = set(subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split())
    if not own:
        pytest.skip("this machine has no address but loopback's")
    assert addresses(certified(tmp_path, command)) == {"127.0.0.1"} | own


def test_a_pod_gets_a_certificate_of_its_address_and_of_the_clusters_services(tmp_path: Path):
    pod = read("configs/kuberay.yaml")["items"][0]["spec"]["headGroupSpec"]["template"]["spec"]
    (command,) = pod["initContainers"][0]["args"]
    mounted = command.replace("/etc/rayseg/tls", str(tmp_path / ".ray" / "tls")).replace("../certifier/", "")
    found = certified(tmp_path, mounted, POD_IP="10.1.2.3", NAMESPACE="ours")
    assert addresses(found) == {"127.0.0.1", "10.1.2.3"}
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "*.ours.svc.cluster.local"]


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as JSON Schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    whole = {key: strict(value) for key, value in schema.items() if key not in ("default", "enum", "required")}
    whole |= {key: schema[key] for key in ("enum", "required") if key in schema}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        whole.setdefault("additionalProperties", False)
    return whole


@functools.cache
def of_kind(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict(KUBERAY[kind]["properties"]["spec"]))


def check_kuberay(item: dict[str, Any]) -> None:
    of_kind(item["kind"]).validate(item["spec"])


def test_kuberay_file_passes_kuberays_own_definitions():
    items = read("configs/kuberay.yaml")["items"]
    assert [item["kind"] for item in items] == ["RayCluster", "RayJob", "RayService", "NetworkPolicy"]
    for item in items[:3]:
        assert item["apiVersion"] == "ray.io/v1"
        check_kuberay(item)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("workerGroupSpecs", 0, "maxWorkers"), 3, "maxWorkers"),
        (("workerGroupSpecs", 0, "replicas"), "2", "'2'"),
        (("headGroupSpec", "template", "spec", "containers", 0, "comand"), ["sh"], "comand"),
        (("authOptions", "mode"), "password", "password"),
        (("tlsOptions",), {"enabled": "yes"}, "'yes'"),
    ],
)
def test_kuberays_definitions_refuse_what_they_should(place: tuple[Any, ...], value: Any, told: str):
    item = copy.deepcopy(read("configs/kuberay.yaml")["items"][0])
    target = item["spec"]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=told):
        check_kuberay(item)


def test_kuberays_own_tls_is_in_the_place_that_the_file_says():
    item = copy.deepcopy(read("configs/kuberay.yaml")["items"][0])
    assert "tlsOptions: {enabled: true}" in (ROOT / "configs" / "kuberay.yaml").read_text()
    item["spec"]["tlsOptions"] = {"enabled": True}
    check_kuberay(item)


def test_only_the_init_container_of_a_pod_sees_the_authoritys_key():
    cluster = read("configs/kuberay.yaml")["items"][0]["spec"]
    mounted = [cluster["autoscalerOptions"]["volumeMounts"]]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        with_key = {
            name
            for name, volume in volumes.items()
            if volume.get("secret", {}).get("secretName") == "rayseg-authority"
            and volume["secret"].get("items") != [{"key": "ca.crt", "path": "ca.crt"}]
        }
        (init,) = pod["initContainers"]
        assert {mount["name"] for mount in init["volumeMounts"]} & volumes.keys() == {"certifier", "tls"}
        mounted += [container["volumeMounts"] for container in pod["containers"]]
        assert with_key == {"certifier"}
    for mounts in mounted:
        assert "certifier" not in {mount["name"] for mount in mounts}
        assert all(mount.get("readOnly") for mount in mounts)


def test_pods_ask_for_a_token_speak_tls_and_say_what_they_have():
    cluster = read("configs/kuberay.yaml")["items"][0]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        told = {entry["name"]: entry["value"] for entry in container["env"]}
        assert told["RAY_USE_TLS"] == "1"
        mounted = tuple(mount["mountPath"] for mount in container["volumeMounts"])
        files = [value for name, value in told.items() if name.endswith(("_FILE", "_CERT", "_KEY"))]
        assert len(files) == 5
        assert all(value.startswith(mounted) for value in files)
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
        if "resources" in group["rayStartParams"]:  # as it goes through the shell of the pod
            (text,) = shlex.split(group["rayStartParams"]["resources"])
            assert json.loads(text)
    groups = {group["groupName"] for group in cluster["workerGroupSpecs"]}
    assert groups == read("cluster.yaml")["available_node_types"].keys() - {"head"}


def test_jobs_and_services_of_kuberay_are_what_ray_takes():
    from ray.runtime_env import RuntimeEnv
    from ray.serve.schema import ServeDeploySchema

    _, job, service, _ = read("configs/kuberay.yaml")["items"]
    assert RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))["working_dir"].startswith("s3://")
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert ServeDeploySchema.model_validate(served)
    ours = read("serving/config.yaml")
    assert served.pop("http_options") == {"host": "0.0.0.0", "port": 8000}
    assert ours.pop("http_options")["port"] == 8000
    assert served == ours
