"""Jobs as objects of Kubernetes: a CronJob on one machine, a TrainJob of Kubeflow on several.

A CronJob calls ``dqrm jobs run``. A TrainJob (Kubeflow Trainer 2.2, trainer.kubeflow.org/v1alpha1)
is one run without a schedule: its pods call torchrun, which the runtime ``torch-distributed`` tells
about nodes and processes in PET_* variables.
"""

from collections.abc import Mapping
from typing import Any

from dqrm.pipelines.jobs.config import Job
from dqrm.pipelines.jobs.crontab import crontab_fields, zone
from dqrm.pipelines.jobs.place import STOP_SECONDS, URI_VARIABLE, Place, named_store
from dqrm.tracking.uri import experiment_name
from dqrm.yaml_text import dump_document

_MOUNT = "/project"
_SHORTEST_DEADLINE = 10
_RUNTIME = "torch-distributed"
# Names in that runtime: https://github.com/kubeflow/trainer, manifests/base/runtimes.
_REPLICATED_JOB = _CONTAINER = "node"
_MANAGER = "dqrm.jobs/export"


def kubernetes_files(jobs: Mapping[str, Job], place: Place) -> dict[str, str]:
    """The files by name.

    Raises:
        ValueError: image or claim is not given.
    """
    if place.image is None or place.claim is None:
        raise ValueError(
            "k8s needs --image, with dqrm in it, and --claim, a volume with the jobs' folder"
        )
    files = {}
    for name, job in jobs.items():
        if job.nodes > 1:
            files[f"dqrm-{name}.yaml"] = _heading(name, job) + dump_document(
                _train_job(name, job, place)
            )
        else:
            files[f"dqrm-{name}.yaml"] = dump_document(_cron_job(name, job, place))
    return files


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "dqrm", "app.kubernetes.io/component": name}


def _volumes(place: Place) -> list[dict[str, Any]]:
    return [{"name": "project", "persistentVolumeClaim": {"claimName": place.claim}}]


_MOUNTS = [{"name": "project", "mountPath": _MOUNT}]


def _cron_job(name: str, job: Job, place: Place) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "job",
        "image": place.image,
        "command": ["dqrm", "jobs", "run", name, "--file", place.file.name],
        "workingDir": _MOUNT,
        "volumeMounts": _MOUNTS,
    }
    if store := named_store({name: job}):
        container["env"] = [{"name": URI_VARIABLE, "value": store}]
    pod = {
        # Retries are the job's own: they are counted and recorded there.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "containers": [container],
        "volumes": _volumes(place),
    }
    spec: dict[str, Any] = {
        "schedule": " ".join(crontab_fields(name, job)),
        "timeZone": zone(job),
        # A second run waits for the first by itself.
        "concurrencyPolicy": "Forbid" if job.overlap == "skip" else "Allow",
        "jobTemplate": {
            "spec": {
                "backoffLimit": 0,
                "template": {"metadata": {"labels": _labels(name)}, "spec": pod},
            }
        },
    }
    if job.missed == "skip":
        seconds = int(job.grace.total_seconds())
        spec["startingDeadlineSeconds"] = max(seconds, _SHORTEST_DEADLINE)
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"dqrm-{name}", "labels": _labels(name)},
        "spec": spec,
    }


def _heading(name: str, job: Job) -> str:
    lines = [
        f"# One run of {name}, with the dates of the day it was written for (`--date`). Kubernetes",
        "# has no schedule for it: `kubectl create -f` starts it.",
    ]
    given = (("retries", job.retries.times), ("gate", job.gate), ("on_failure", job.on_failure))
    dropped = [key for key, value in given if value]
    if dropped:
        lines.append(f"# A TrainJob does not keep these settings of the job: {', '.join(dropped)}.")
    return "".join(f"{line}\n" for line in lines)


def _train_job(name: str, job: Job, place: Place) -> dict[str, Any]:
    # A TrainJob has no folder to start in.
    enter = ["sh", "-c", 'cd "$0" && exec "$@"', _MOUNT]
    trainer: dict[str, Any] = {
        "image": place.image,
        "numNodes": job.nodes,
        "numProcPerNode": job.processes,
        "command": enter,
        "args": ["torchrun", "-m", *job.rendered_command(place.day)],
    }
    if environment := _environment(name, job):
        trainer["env"] = environment
    pod = {
        "containers": [{"name": _CONTAINER, "volumeMounts": _MOUNTS}],
        "volumes": _volumes(place),
    }
    replicated = {
        "name": _REPLICATED_JOB,
        "template": {"spec": {"template": {"spec": pod}}},
    }
    spec: dict[str, Any] = {
        "runtimeRef": {"name": _RUNTIME},
        "trainer": trainer,
        "runtimePatches": [
            {
                "manager": _MANAGER,
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
            }
        ],
    }
    if job.timeout is not None:
        spec["activeDeadlineSeconds"] = int(job.timeout.total_seconds())
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "generateName": f"dqrm-{name}-",
            "labels": _labels(name),
            "annotations": {"dqrm.jobs/date": place.day.isoformat()},
        },
        "spec": spec,
    }


def _environment(name: str, job: Job) -> list[dict[str, str]]:
    if not job.tracking.enabled:
        return []
    uri = job.tracking.uri or named_store({name: job})
    given = {URI_VARIABLE: uri, "MLFLOW_EXPERIMENT_NAME": experiment_name(job.tracking.experiment)}
    return [{"name": key, "value": value} for key, value in given.items() if value]
