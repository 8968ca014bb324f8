"""``deploy/training``: what starts there is a command line that this version understands."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import yaml

from keras_emr_cli.settings import merge
from keras_emr_cli.train import command
from keras_emr_cli.train_settings import TRAIN

FOLDER = Path(__file__).parents[2] / "deploy" / "training"
# Fields of the two custom resources that the manifests use, as their references list them.
JOBSET = {"network", "failurePolicy", "replicatedJobs"}
RAYJOB = {
    "entrypoint",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "rayClusterSpec",
}


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def parsed(words, environment):
    """The settings of ``keras-emr train WORDS``; unknown flags and values raise."""
    assert words[0] == "train"
    with command.make_context("train", list(words[1:]), resilient_parsing=False) as context:
        flags = dict(context.params)
    switches = {name: flags.pop(name) for name in ("resume", "overwrite", "dry_run", "as_json")}
    flags.pop("quiet")
    return merge(TRAIN, flags, flags.pop("config"), environment), switches


def container(template):
    (found,) = template["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def hosts():
    manifest = read("jobset.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(manifest["spec"]) == JOBSET
    (job,) = manifest["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    return manifest, job


def test_the_job_of_the_set_meets_its_schema(hosts):
    validate = pytest.importorskip("kubernetes_validate")
    _, job = hosts
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    validate.validate(whole, "1.37", strict=True)


def test_every_host_joins_one_job(hosts):
    """The coordinator is the first pod of the set, at the port that it opens."""
    manifest, job = hosts
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    one = container(spec["template"])
    environment = {entry["name"]: entry.get("value", "3") for entry in one["env"]}
    (script, name) = one["args"]
    line = next(line for line in script.splitlines() if line.startswith("exec keras-emr"))
    words = shlex.split(line)
    assert name == "train" and words[:2] == ["exec", "keras-emr"] and words[-1] == "$@"
    settings, _ = parsed([*words[2:-1], "--resume"], environment)
    assert settings.distribute == "data" and settings.backend == "jax"
    assert settings.processes == spec["completions"] and settings.process == 3
    host, port = settings.coordinator.split(":")
    network = manifest["spec"]["network"]
    assert host == f"{manifest['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"
    assert int(port) in [entry["containerPort"] for entry in one["ports"]]
    (index,) = [e["valueFrom"] for e in one["env"] if "valueFrom" in e]
    assert "job-completion-index" in index["fieldRef"]["fieldPath"]
    assert f"{settings.out}/config.yaml" in script  # what decides between start and resume
    mounts = [entry["mountPath"] for entry in one["volumeMounts"]]
    assert all(any(str(p).startswith(m) for m in mounts) for p in (settings.out, settings.data))


@pytest.fixture(scope="module")
def ray_job():
    spec = importlib.util.spec_from_file_location("ray_job", FOLDER / "ray_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ray_job_starts_what_its_cluster_holds(ray_job):
    manifest = read("rayjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert set(manifest["spec"]) == RAYJOB
    cluster = manifest["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    (group,) = cluster["workerGroupSpecs"]
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[0] == "python" and Path(words[1]).name == "ray_job.py"
    own, theirs = words[2 : words.index("--")], words[words.index("--") + 1 :]
    count = int(own[own.index("--processes") + 1])
    assert count == group["replicas"] == group["minReplicas"]
    environment = ray_job.environment("10.0.0.1:29500", count, 2)
    settings, _ = parsed(theirs, environment)
    assert (settings.coordinator, settings.processes, settings.process) == (
        "10.0.0.1:29500",
        count,
        2,
    )
    assert settings.distribute == "data"


@pytest.mark.parametrize("kind", ["headGroupSpec", "workerGroupSpecs"])
def test_the_pods_of_the_cluster_meet_their_schema(kind):
    validate = pytest.importorskip("kubernetes_validate")
    found = read("rayjob.yaml")["spec"]["rayClusterSpec"][kind]
    template = (found[0] if isinstance(found, list) else found)["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
    validate.validate(pod, "1.37", strict=True)


def test_a_flag_that_does_not_exist_would_be_found():
    with pytest.raises(click.NoSuchOption):
        parsed(["train", "--distribute-all"], {})


def test_a_ray_worker_runs_keras_emr_and_resumes(ray_job, tmp_path, monkeypatch):
    """``work`` in this process: the command, its environment, its exit code."""
    out = tmp_path / "run"
    words = ["train", "--out", str(out)]
    assert ray_job.command(words) == [sys.executable, "-m", "keras_emr_cli.main", *words]
    out.mkdir()
    (out / "config.yaml").touch()
    assert ray_job.command(words)[-1] == "--resume"
    seen = tmp_path / "seen.json"
    code = f"import json, os; json.dump(dict(os.environ), open({str(seen)!r}, 'w')); exit(7)"
    monkeypatch.setattr(ray_job, "command", lambda words: [sys.executable, "-c", code])
    assert ray_job.work(words, "h:1", 4, 3) == 7
    told = {k: v for k, v in json.loads(seen.read_text()).items() if k.startswith("KERAS_EMR_")}
    assert told | ray_job.environment("h:1", 4, 3) == told


def test_every_path_in_the_comments_exists():
    for path in FOLDER.iterdir():
        for name in re.findall(r"deploy/training/([\w.]+)", path.read_text()):
            assert (FOLDER / name).exists(), name
