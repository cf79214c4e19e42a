"""The launch files that have no test of their own kind: Kubernetes, TPU VMs."""

import json
import subprocess
import sys

import pytest
import tiny_job
import yaml

from cm3leon_jax.parallel import preflight
from cm3leon_jax.training.preemption import EXIT_CODE

LAUNCH = tiny_job.ROOT / "launch"
MANIFESTS = sorted((LAUNCH / "gke").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid_for_kubernetes(path):
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="is in the extra `parity`"
    )
    service, job = yaml.safe_load_all(path.read_text())
    for document in (service, job):
        kubernetes_validate.validate(document, "1.31", strict=True)
    broken = json.loads(json.dumps(job))
    broken["spec"]["completion"] = 1  # so that strict is strict
    with pytest.raises(Exception, match="completion"):
        kubernetes_validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_pods_of_a_manifest_find_each_other_and_start_again(path):
    service, job = yaml.safe_load_all(path.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    codes = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    # What has not met tries again, so often as backoffLimit says.
    assert codes == {(2,): "FailJob", (EXIT_CODE,): "Ignore"}
    assert (preflight.EXIT_CODE,) not in codes
    assert spec["backoffLimit"] >= spec["completions"]
    assert (tiny_job.ROOT / container["command"][1]).is_file()
    environment = {one["name"]: one for one in container["env"]}
    assert environment["CM3LEON_START_TIMEOUT"]["value"] == "1800"
    if "JAX_NUM_PROCESSES" in environment:
        assert environment["JAX_NUM_PROCESSES"]["value"] == str(spec["completions"])
        address = f"{job['metadata']['name']}-0.{service['metadata']['name']}:8476"
        assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == address
    else:  # GKE's own
        assert "google.com/tpu" in container["resources"]["limits"]


def test_the_image_holds_neither_history_nor_environments_nor_runs():
    assert "\nCOPY . " in (LAUNCH / "gke" / "Dockerfile").read_text()
    left_out = (tiny_job.ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(left_out)


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_tpu_workers_are_told_who_they_are_and_started_again(tmp_path):
    """With a gcloud and a metadata server of our own: worker 1 of 2, stopped once, and
    once without the other."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    for folder in (tools, home):
        folder.mkdir()
    (home / "cm3leon_jax").symlink_to(tiny_job.ROOT)
    program(
        tools,
        "gcloud",
        f'echo "$@" >>{tmp_path}/asked; cd {home}\n'
        'for last in "$@"; do :; done; exec bash -c "${last#--command=}"',
    )
    program(
        tools,
        "curl",
        'for last in "$@"; do :; done; case $last in\n'
        "*/worker-network-endpoints) echo -n x:y:10.0.0.5,x:y:10.0.0.6 ;;\n"
        "*/agent-worker-number) echo -n 1 ;;\n*) exit 22 ;; esac",
    )
    program(
        tools,
        "python",
        "echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID "
        f'"$@" >>{tmp_path}/ran\n'
        f"case $(wc -l <{tmp_path}/ran) in 1) exit {EXIT_CODE} ;; "
        f"2) exit {preflight.EXIT_CODE} ;; esac",
    )
    environment = tiny_job.environment()
    environment |= {"PATH": f"{tools}:{environment['PATH']}"}
    environment |= {"CM3LEON_PYTHON": str(tools / "python"), "CM3LEON_PAUSE": "0"}
    command = ["bash", str(LAUNCH / "tpu_vm" / "run.sh"), "pod", "us-east5-a"]
    command += ["pretrain", "--workdir", "/mnt/two words"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == ["10.0.0.5:8476 2 1 launch/pretrain.py --workdir /mnt/two words"] * 3
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(
        "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all"
    )


def test_slurm_counts_crashes_and_nothing_else(tmp_path):
    """With an srun of our own that ends as the test says."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools, "srun", "exit $ENDS")
    program(tools, "scontrol", f"[ $1 = show ] && echo n1 || echo $@ >>{tmp_path}/said")
    program(tools, "sleep", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    job |= {"SLURM_JOB_NODELIST": "n1", "CM3LEON_RESTARTS": "2"}
    job |= {"PATH": f"{tools}:{tiny_job.environment()['PATH']}"}
    said = tmp_path / "said"

    def requeued(code, restarts):
        said.write_text("")
        done = subprocess.run(
            ["bash", str(LAUNCH / "slurm" / "run.sbatch"), "pretrain"],
            env=tiny_job.environment()
            | job
            | {"ENDS": str(code), "SLURM_RESTART_COUNT": str(restarts)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and not done.stderr
        return said.read_text() == "requeue 7\n"

    assert requeued(EXIT_CODE, 5000)  # preempted
    assert requeued(137, 5001)  # the first crash
    assert requeued(EXIT_CODE, 5002)
    assert requeued(preflight.EXIT_CODE, 5003)  # the second
    assert requeued(EXIT_CODE, 5004)
    assert not requeued(134, 5005)  # the third
    assert not requeued(2, 0) and not requeued(1, 0) and not requeued(0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"tools", "said"}


@pytest.mark.parametrize(
    "path", sorted(LAUNCH.rglob("*.sh")) + sorted(LAUNCH.rglob("*.sbatch")), ids=str
)
def test_scripts_are_bash(path):
    assert sys.platform != "win32"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
