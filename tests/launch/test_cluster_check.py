"""Every shipped cluster file passes, and each way to break one gives a line of its own at its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distml.launch.check.command import check_file

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "clusters").rglob("*.yaml"))
AWS, GCP, LOCAL = "aws-gpu.yaml", "gcp-gpu.yaml", "local.yaml"
CLUSTER, JOB = "kuberay/raycluster-gpu.yaml", "kuberay/rayjob-gpu.yaml"


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """A user with a token, at the repository's root."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    (home / ".ray" / "auth_token").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_each_shipped_file_passes(file):
    said, lines = check_file(file)
    assert lines == []
    assert said


# Of a file: what is replaced, by what; where the finding points (the first such text in the broken file); what it says.
BROKEN = [
    (
        AWS,
        "cluster_name:",
        "clustername:",
        "clustername",
        "unknown key 'clustername' in the file; did you mean 'cluster_name'?",
    ),
    (
        AWS,
        "max_workers: 2\n",
        "max_worker: 2\n",
        "max_worker:",
        "unknown key 'max_worker' in available_node_types.gpu; did you mean",
    ),
    (
        AWS,
        "{CPU: 48, GPU: 4}",
        "{CPU: 48, GPU: 0.5}",
        "0.5",
        "available_node_types.gpu.resources.GPU must be a whole number",
    ),
    (AWS, "{CPU: 48, GPU: 4}", "{CPU: 48, GPU: 8}", "8}", "gpu says 8 of GPU, and a g6.12xlarge has 4; what asks"),
    (
        AWS,
        "{CPU: 48, GPU: 4}",
        "{CPU: 48}",
        "resources: {CPU: 48}",
        "gpu is a g6.12xlarge, whose 4 GPUs its resources leave out",
    ),
    (AWS, "type: aws", "type: awz", "awz", "unknown provider 'awz'; did you mean 'aws'?"),
    (AWS, "  region: us-west-2\n", "", "provider:", "provider.region is missing"),
    (
        AWS,
        "region:",
        "regions: a\n  region:",
        "regions",
        "unknown key 'regions' of the provider aws, which Ray forgets in silence",
    ),
    (
        AWS,
        "max_workers: 6",
        "max_workers: 1",
        "max_workers: 1",
        "max_workers is 1, below the 2 that min_workers of the node types",
    ),
    (AWS, "min_workers: 2", "min_workers: 3", "min_workers: 3", "min_workers of gpu is 3, above its max_workers 2"),
    (
        AWS,
        "head_node_type: head",
        "head_node_type: haed",
        "haed",
        "head_node_type 'haed' is not in available_node_types; did you mean 'head'?",
    ),
    (
        AWS,
        "InstanceType: m7i.2xlarge",
        "InstanceType: g6.12xlarge",
        "resources: {CPU: 0}",
        "head is a g6.12xlarge, whose 4 GPUs",
    ),
    (
        AWS,
        "resources: {CPU: 0} ",
        "resources: {GPU: 4} ",
        "GPU: 4}",
        "the head node has 4 GPUs beside those of the workers",
    ),
    (
        AWS,
        ": constraints.txt",
        ": contraints.txt",
        "contraints.txt",
        "there is no contraints.txt to copy to ~/distml-constraints.txt",
    ),
    (AWS, "  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "file_mounts:", "no token is copied to the nodes"),
    (
        AWS,
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        ">-",
        "--dashboard-host=0.0.0.0 opens dashboard and Jobs API",
    ),
    (
        AWS,
        "    export RAY_AUTH_MODE=token RAY_grpc_keepalive_timeout_ms=40000; ulimit -n 65536;\n    ray start --address",
        "    ray start --address",
        "SECOND >-",
        "the worker starts without a token",
    ),
    (
        AWS,
        "export RAY_AUTH_MODE=token RAY_health",
        "export RAY_AUTH_MODE=disabled RAY_health",
        ">-",
        "the head starts with RAY_AUTH_MODE=disabled",
    ),
    (
        AWS,
        " --disable-usage-stats\n\nworker",
        " --num-gpus=8\n\nworker",
        ">-",
        "ray start --num-gpus=8, and no node type has more than 4 GPUs",
    ),
    (
        AWS,
        "    --autoscaling-config=~/ray_bootstrap_config.yaml",
        "   ",
        ">-",
        "ray start --head without --autoscaling-config",
    ),
    (
        AWS,
        "$RAY_HEAD_IP:6379",
        "$RAY_HEAD_IP:6380",
        "SECOND >-",
        "workers look for the head at $RAY_HEAD_IP:6380, and it listens on port 6379",
    ),
    (AWS, "2.60.0-py311", "2.58.0-py311", "rayproject", "Ray 2.58.0; distml is tested with <2.61,>=2.60"),
    (AWS, "2.60.0-py311", "2.60.0-py39", "rayproject", "Python 3.9; distml is tested with ==3.11.*"),
    (
        AWS,
        "ray:2.60.0-py311-gpu",
        "ray:latest-gpu",
        "rayproject",
        "the image 'rayproject/ray:latest-gpu' does not say which Ray",
    ),
    (
        AWS,
        "- pip install boto3",
        "- pip install boto3 torch",
        "pip install boto3 t",
        "pip install torch without a version",
    ),
    (
        AWS,
        "- pip install boto3",
        "- jupyter lab --ip=0.0.0.0 &",
        "jupyter",
        "0.0.0.0 makes a service listen on every interface",
    ),
    (
        AWS,
        "- pip install boto3",
        "- aws configure set aws_secret_access_key abc/def",
        "aws configure set",
        "an AWS secret key stands here; keep it out",
    ),
    (
        AWS,
        "- pip install boto3",
        "- export WANDB_API_KEY=0123456789",
        "export WANDB",
        "the value of WANDB_API_KEY stands here; keep it out",
    ),
    (
        AWS,
        "  cache_stopped_nodes: false",
        "  aws_credentials: {aws_access_key_id: AKIAIOSFODNN7EXAMPLE}",
        "aws_credentials",
        "provider.aws_credentials keeps credentials in the file",
    ),
    (
        AWS,
        "  cache_stopped_nodes: false",
        "  security_group:\n    IpPermissions:\n    - {FromPort: 8265, ToPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}",
        "{FromPort",
        "ports 8265 to 8265 are opened to everyone",
    ),
    (
        AWS,
        "  ssh_user: ubuntu",
        "  ssh_user: ubuntu\n  ssh_private_key: ~/.ssh/none",
        "~/.ssh/none",
        "there is no ~/.ssh/none",
    ),
    (AWS, "  container_name: distml\n", "", "docker:", "docker needs container_name beside the image"),
    (
        AWS,
        "head_node_type: head",
        "head_node_type: head\nmax_workers: 6",
        "SECOND max_workers: 6",
        "duplicate key 'max_workers', first on line",
    ),
    (
        AWS,
        "worker_start_ray_commands:\n  - ray stop\n",
        "worker_start_ray_commands:\n  - ray stop\n\t- x\n",
        "\t- x",
        "not YAML: ",
    ),
    (GCP, "  project_id: my-project", "  #", "provider:", "provider.project_id is missing"),
    (
        GCP,
        "machineType: g2-standard-48",
        "machineType: n1-standard-8",
        "4}",
        "gpu says GPU: 4, and a n1-standard-8 without guestAccelerators",
    ),
    (LOCAL, "  head_ip: 192.168.1.10", "  #", "provider:", "provider.head_ip is missing"),
    (LOCAL, "[192.168.1.11,", "[192.168.1.10,", "[192", "provider.head_ip is among worker_ips"),
    (
        LOCAL,
        "provider:\n",
        "max_workers: 3\nprovider:\n",
        "max_workers: 3",
        "max_workers is 3, and provider.worker_ips names 2 machines",
    ),
    (LOCAL, "python3.11 -m venv", "python3.10 -m venv", "test -x", "Python 3.10; distml is tested with"),
    (CLUSTER, "mode: token", "mode: disabled", "authOptions", "Ray starts without a token"),
    (
        CLUSTER,
        "groupName: gpu",
        "groupname: gpu",
        "groupname",
        "unknown key 'groupname' in spec.workerGroupSpecs.0; did you mean 'groupName'?",
    ),
    (
        CLUSTER,
        "  rayVersion: 2.60.0\n",
        "",
        "authOptions",
        "authOptions needs rayVersion 2.52.0 or later, and it is missing",
    ),
    (
        CLUSTER,
        "name: distml-gpu\nspec:\n  rayV",
        "name: Distml_GPU\nspec:\n  rayV",
        "Distml_GPU",
        "metadata.name 'Distml_GPU' must be lower-case",
    ),
    (
        CLUSTER,
        "ray.io/v1",
        "ray.io/v1alpha1",
        "ray.io/v1alpha1",
        "apiVersion is 'ray.io/v1alpha1', which KubeRay is about to drop",
    ),
    (
        CLUSTER,
        "dashboard-host: 127.0.0.1}\n    template:\n",
        "dashboard-host: 127.0.0.1}\n    serviceType: NodePort\n    template:\n",
        "serviceType",
        "serviceType NodePort opens Ray to the outside",
    ),
    (CLUSTER, "minReplicas: 2", "minReplicas: 3", "minReplicas", "minReplicas of gpu is 3, above its maxReplicas 2"),
    (CLUSTER, "rayStartParams: {}", 'rayStartParams: {num-gpus: "8"}', '"8"', "gpu: num-gpus 8, and its pods have 4"),
    (
        JOB,
        "/mnt/runs/gpt2-124m-8gpu",
        "/tmp/runs",
        "entrypoint",
        "a retry starts new pods, and the job writes to /tmp/runs",
    ),
    (JOB, " --out /mnt/runs/gpt2-124m-8gpu", "", "entrypoint", "a retry starts new pods, and the job has no --out"),
    (
        JOB,
        "  backoffLimit: 3",
        "  backoffLimit: 3\n  entrypointNumGpus: 8",
        "entrypointNumGpus",
        "entrypointNumGpus is 8, and no pod has more than 4",
    ),
    (
        JOB,
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        "ttlSeconds",
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
    ),
    (
        JOB,
        "kind: NetworkPolicy",
        "kind: NoPolicy",
        "dashboard-host",
        "the dashboard listens on 0.0.0.0, and no NetworkPolicy in this file",
    ),
    (
        JOB,
        "- {name: runs, mountPath",
        "- {name: run, mountPath",
        "run, mountPath",
        "head: no volume is called 'run'; add it",
    ),
    (
        JOB,
        "  rayClusterSpec:\n",
        "  clusterSelector:\n    ray.io/cluster: mine\n  rayClusterSpec:\n",
        "backoffLimit",
        "backoffLimit does not work with clusterSelector",
    ),
]


def _place(text: str, at: str) -> tuple[int, int]:
    """Line and column of the first, or the second, such text outside of comments."""
    uncommented = re.sub(r"(?m)^#.*$", lambda found: " " * len(found[0]), text)
    index = uncommented.index(at.removeprefix("SECOND "))
    if at.startswith("SECOND "):
        index = uncommented.index(at.removeprefix("SECOND "), index + 1)
    before = uncommented[:index]
    return before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1


@pytest.mark.parametrize(
    ("name", "old", "new", "at", "said"), BROKEN, ids=[f"{one[0]} {one[4]}"[:70] for one in BROKEN]
)
def test_each_broken_file_is_told_at_its_place(tmp_path, name, old, new, at, said):
    text = (ROOT / "clusters" / name).read_text()
    assert text.count(old) >= 1
    broken = text.replace(old, new, 1)
    file = tmp_path / "broken.yaml"
    file.write_text(broken)
    _, lines = check_file(file)
    line, column = _place(broken, at)
    assert any(found.startswith(f"{file}:{line}:{column}: {said}") for found in lines), lines
    assert all("\n" not in found for found in lines)
