"""The containers that deploy/ describes, for docker compose and for Kubernetes alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from checkout import ROOT

DEPLOY = ROOT / "deploy"
CUDA = DEPLOY / "compose.cuda.yaml"  # It is put over another file.
FILES = sorted(path for path in DEPLOY.rglob("*.yaml") if path != CUDA)


@dataclass(frozen=True, slots=True)
class Container:
    """What is started, and within which bounds. `command` is None where the image's own start runs."""

    name: str
    command: Sequence[str] | None
    arguments: Sequence[str]
    environment: Mapping[str, str]
    mounts: Mapping[str, str]  # where: what, as it is called in the file
    is_root: bool
    can_write_root: bool
    can_gain: bool
    memory: str | None
    grace_s: float


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def serve_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration of Ray Serve, with where it stands."""
    for path in FILES:
        for document in documents(path):
            if "applications" in document:
                yield path.name, document
            for config in document.get("configs", {}).values():
                yield path.name, yaml.safe_load(config["content"])
            if document.get("kind") == "RayService":
                yield path.name, yaml.safe_load(document["spec"]["serveConfigV2"])


def containers() -> Iterator[Container]:
    """All of all files."""
    for path in FILES:
        for document in documents(path):
            if "services" in document:
                yield from (_of_compose(f"{path.name} {name}", found) for name, found in document["services"].items())
            for pod in pods(document):
                yield from (_of_kubernetes(path.name, pod, found) for found in pod["containers"])
    (over,) = documents(CUDA)
    (under,) = documents(DEPLOY / "compose.yaml")
    for name, found in over["services"].items():
        yield _of_compose(f"{CUDA.name} {name}", _put_over(under["services"][name], found))


def pods(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The specifications of a document's pods."""
    if document.get("kind") == "Deployment":
        yield document["spec"]["template"]["spec"]
    if document.get("kind") == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        yield from (group["template"]["spec"] for group in groups)


def _put_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As compose does it: mappings are merged, all else is replaced."""
    both = {key: value for key, value in over.items() if isinstance(value, dict) and isinstance(under.get(key), dict)}
    return {**under, **over, **{key: _put_over(under[key], value) for key, value in both.items()}}


def _of_compose(name: str, found: Mapping[str, Any]) -> Container:
    mounts = {where: what for what, where in (text.split(":")[:2] for text in found.get("volumes", ()))}
    mounts |= {f"/run/secrets/{secret}": f"secret {secret}" for secret in found.get("secrets", ())}
    mounts |= dict.fromkeys(found.get("tmpfs", ()), "tmpfs")
    user = str(found.get("user", "0")).split(":")[0]
    return Container(
        name=name,
        command=found.get("entrypoint"),
        arguments=found.get("command", ()),
        environment=found.get("environment", {}),
        mounts=mounts,
        is_root=user == "0",
        can_write_root=not found.get("read_only", False),
        can_gain="no-new-privileges:true" not in found.get("security_opt", ()) or found.get("cap_drop") != ["ALL"],
        memory=found.get("deploy", {}).get("resources", {}).get("limits", {}).get("memory"),
        grace_s=float(found.get("stop_grace_period", "10s").removesuffix("s")),
    )


def _of_kubernetes(file: str, pod: Mapping[str, Any], found: Mapping[str, Any]) -> Container:
    what = {volume["name"]: volume for volume in pod["volumes"]}
    user, security = pod["securityContext"], found["securityContext"]
    return Container(
        name=f"{file} {found['name']}",
        command=found.get("command"),
        arguments=found.get("args", ()),
        environment={entry["name"]: entry["value"] for entry in found["env"]},
        mounts={
            mount["mountPath"]: next(kind for kind in what[mount["name"]] if kind != "name")
            for mount in found["volumeMounts"]
        },
        is_root=not (user["runAsNonRoot"] and user["runAsUser"]),
        can_write_root=not security["readOnlyRootFilesystem"],
        can_gain=security["allowPrivilegeEscalation"] or security["capabilities"] != {"drop": ["ALL"]},
        memory=found["resources"]["limits"].get("memory"),
        grace_s=float(pod["terminationGracePeriodSeconds"]),
    )
