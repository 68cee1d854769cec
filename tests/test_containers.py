"""The compose file and the Kubernetes manifests: their validators accept them, and their parts fit each other."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import PROGRAM
from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.demo import CHECKPOINT

yaml = pytest.importorskip("yaml")

COMPOSE_TEXT = (REPOSITORY / "compose.yaml").read_text(encoding="utf-8")
KUBERNETES = REPOSITORY / "docs" / "kubernetes"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
PORT = 23333


def interpolated(text: str) -> str:
    """The compose file as it is without any variable of the environment."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


COMPOSE: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE_TEXT))
SERVICE: dict[str, Any] = COMPOSE["services"]["server"]
OBJECTS: dict[str, Any] = {
    item["kind"]: item for path in sorted(KUBERNETES.glob("*.yaml")) for item in yaml.safe_load_all(path.read_text())
}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


# ---- what validators say ----


def compose_is_valid(text: str) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    read = compose_spec.PyCompose.from_yaml(interpolated(text))
    read.validate()
    read.to_spec()


def test_the_compose_file_follows_the_compose_specification() -> None:
    compose_is_valid(COMPOSE_TEXT)


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("read_only: true", "reed_only: true", "reed_only"),
        ("cap_drop:\n      - ALL", "cap_drop: 7", "cap_drop"),
        ("35s", "35 parsecs", "stop_grace_period"),
    ],
)
def test_a_compose_file_that_does_not_is_found(right: str, wrong: str, named: str) -> None:
    pytest.importorskip("compose_spec")
    assert right in COMPOSE_TEXT
    with pytest.raises(ValueError, match=named):
        compose_is_valid(COMPOSE_TEXT.replace(right, wrong))


@pytest.mark.parametrize("version", ["1.30", "1.34", "1.37"])
@pytest.mark.parametrize("kind", sorted(set(OBJECTS) - {"ServiceMonitor"}))
def test_kubernetes_takes_each_manifest(kind: str, version: str) -> None:
    """The schemas of three releases of Kubernetes, in which an unknown field is an error."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_a_manifest_that_kubernetes_would_refuse_is_found() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = copy.deepcopy(OBJECTS["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"]["pth"] = "/livez"
    with pytest.raises(kubernetes_validate.ValidationError, match="pth"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


# ---- how the parts fit ----


def test_a_drain_is_over_before_the_server_is_killed() -> None:
    drain = int(after(CONTAINER["args"], "--drain"))
    wait = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= drain + wait + 5
    assert int(SERVICE["stop_grace_period"].rstrip("s")) >= int(after(SERVICE["command"], "--drain")) + 5


def test_probes_ask_the_path_that_means_what_they_do() -> None:
    """A server that loads or drains is not ready, and must not be restarted for it."""
    paths = {name: CONTAINER[name]["httpGet"]["path"] for name in CONTAINER if name.endswith("Probe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    startup = CONTAINER["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


def test_nothing_runs_as_root_or_may_become_it() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert f"\nUSER {POD['securityContext']['runAsUser']}\n" in DOCKERFILE
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert int(SERVICE["user"]) > 0


def test_only_cache_and_temporary_files_are_written() -> None:
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert set(mounts) == set(volumes)
    assert {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")} == {"/cache", "/tmp"}
    assert "emptyDir" in volumes["cache"]
    assert "XDG_CACHE_HOME=/cache" in DOCKERFILE
    assert [volume for volume in SERVICE["volumes"] if not volume.endswith(":ro")] == ["cache:/cache"]
    assert SERVICE["tmpfs"][0].startswith("/tmp:")
    assert "cache" in COMPOSE["volumes"]


def test_every_server_has_a_key_where_it_looks_for_it() -> None:
    file = after(CONTAINER["args"], "--api-key-file")
    mount = next(mount for mount in CONTAINER["volumeMounts"] if file.startswith(f"{mount['mountPath']}/"))
    secret = next(volume["secret"] for volume in POD["volumes"] if volume["name"] == mount["name"])
    assert f"{mount['mountPath']}/{secret['items'][0]['path']}" == file
    credentials = OBJECTS["ServiceMonitor"]["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert credentials == {"name": secret["secretName"], "key": secret["items"][0]["key"]}
    command = (KUBERNETES / "server.yaml").read_text(encoding="utf-8")
    assert f"create secret generic {secret['secretName']} --from-literal={secret['items'][0]['key']}=" in command
    assert after(SERVICE["command"], "--api-key-file") == f"/run/secrets/{SERVICE['secrets'][0]}"
    assert SERVICE["secrets"] == list(COMPOSE["secrets"])


def test_requests_reach_the_server() -> None:
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    monitor = OBJECTS["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= OBJECTS["Service"]["metadata"]["labels"].items()
    (port,) = OBJECTS["Service"]["spec"]["ports"]
    (opened,) = CONTAINER["ports"]
    assert (port["port"], port["targetPort"], opened["containerPort"]) == (PORT, opened["name"], PORT)
    assert monitor["endpoints"][0]["port"] == port["name"]
    assert monitor["endpoints"][0]["path"] == "/metrics"
    assert OBJECTS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == opened["name"]
    assert f"EXPOSE {PORT}" in DOCKERFILE
    assert SERVICE["ports"] == [f"127.0.0.1:{PORT}:{PORT}"], "other machines reach it when somebody decides so"


def test_the_bundle_is_only_read() -> None:
    (claim,) = [volume["persistentVolumeClaim"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume]
    assert claim == {"claimName": OBJECTS["PersistentVolumeClaim"]["metadata"]["name"], "readOnly": True}
    assert CONTAINER["args"][0] == SERVICE["command"][0] == "/bundle"
    assert "/bundle" in [mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount.get("readOnly")]


def test_images_are_those_that_the_dockerfile_says_how_to_build() -> None:
    assert CONTAINER["image"] == SERVICE["image"]
    assert f"docker build -t {SERVICE['image']} --target {SERVICE['build']['target']} ." in DOCKERFILE
    assert re.search(rf"^FROM \S+ AS {SERVICE['build']['target']}$", DOCKERFILE, re.MULTILINE)


# ---- the server as a container runs it, without a container ----


def python_of_everybody() -> str:
    """An interpreter of this version that other users may run; that of an environment may lie in somebody's home."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can run something as another user")
    for found in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        try:
            if subprocess.run([found, "-c", ""], user=10001, cwd="/", check=False).returncode == 0:
                return found
        except OSError:
            continue
    pytest.skip("no Python that another user may run")


def test_a_bundle_of_another_user_is_served_and_nothing_is_written_into_it() -> None:
    """The user of the image has no home that it could write into, and reads what root has written."""
    for package in ("onnxruntime", "starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    python = python_of_everybody()
    with tempfile.TemporaryDirectory() as scratch:  # others may not look into the folders of pytest
        folder = Path(scratch)
        folder.chmod(0o755)
        bundle = export_bundle(CHECKPOINT, folder / "bundle")
        (cache := folder / "cache").mkdir()
        os.chown(cache, 10001, 10001)
        before = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in bundle.rglob("*")}
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if not path.startswith(sys.base_prefix)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/nonexistent",
            "XDG_CACHE_HOME": str(cache),
            "TMPDIR": str(cache),
            "INTERNVL_EDGE_API_KEY": "a-long-secret",
        }
        command = [
            python,
            *PROGRAM[1:],
            "serve",
            str(bundle),
            "--host",
            "0.0.0.0",
            "--port",
            "0",
            "--threads",
            "1",
            "--quiet",
        ]
        process = subprocess.Popen(
            command, user=10001, group=10001, extra_groups=[], cwd=cache, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "answers at http" in line, line
            port = int(line.rpartition(":")[2].partition("/")[0])
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode(),
                {"Content-Type": "application/json", "Authorization": "Bearer a-long-secret"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] > 0
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
        after_it = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in bundle.rglob("*")}
        assert after_it == before


def test_every_option_of_the_manifests_is_one_of_serve() -> None:
    from internvl_edge.cli.serve import command

    for arguments in (CONTAINER["args"], SERVICE["command"], ["/bundle", "--host", "0.0.0.0"]):
        values = command.make_context("serve", list(arguments)).params
        assert str(values["bundle"]) == "/bundle"
        assert values["host"] == "0.0.0.0"
        assert values["port"] == PORT
