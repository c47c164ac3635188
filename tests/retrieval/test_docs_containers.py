"""The guides for Docker and Kubernetes, as far as they can be looked at without a daemon and a cluster.

The manifest is compared with Kubernetes' own schemas, the Dockerfile is read by hadolint, commands inside both are
parsed, and where the clients are installed, the command lines of the pages are given to them: without anybody to talk
to, a client that has understood its flags says that it cannot connect.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import ROOT, Line, blocks, command_lines, parse

from memoir_retrieval.cli import cli

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `dev`")

DOCKER, KUBERNETES = ROOT / "docs/how-to/docker.md", ROOT / "docs/how-to/kubernetes.md"
CLUSTERS = ("1.29", "1.33", "1.37")
HADOLINT = Path(sys.executable).with_name("hadolint")


def manifests() -> list[dict[str, Any]]:
    ((_, block),) = blocks(KUBERNETES, "yaml")
    return list(yaml.safe_load_all("\n".join(block)))


@pytest.mark.parametrize("version", CLUSTERS)
def test_the_manifest_fits_the_schemas_of_kubernetes(version: str) -> None:
    documents = manifests()
    assert [manifest["kind"] for manifest in documents] == ["Deployment", "Service"]
    for manifest in documents:
        kubernetes_validate.validate(manifest, version, strict=True)
    wrong = copy.deepcopy(documents[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["startupProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_manifest_runs_commands_that_exist() -> None:
    deployment, service = manifests()
    pod = deployment["spec"]["template"]["spec"]
    (doctor,), (server,) = pod["initContainers"], pod["containers"]
    parse(cli, "memoir", doctor["command"][1:])
    parse(cli, "memoir", ["serve", *server["args"]])  # the image's entry point, checked below
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_the_dockerfile(tmp_path: Path) -> None:
    ((_, block),) = blocks(DOCKER, "dockerfile")
    assert 'ENTRYPOINT ["memoir", "serve"]' in block

    def complaints(lines: list[str]) -> str:
        (tmp_path / "Dockerfile").write_text("\n".join(lines) + "\n")
        done = subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert complaints(block) == ""
    assert "unexpected" in complaints([*block, "COPPY dist ."])


@pytest.mark.parametrize(
    "line", [line for page in (DOCKER, KUBERNETES) for line in command_lines(page)], ids=lambda line: str(line)
)
def test_the_clients_understand_their_command_lines(line: Line, tmp_path: Path) -> None:
    if line.program not in ("docker", "kubectl"):
        pytest.skip("no command of a container client")
    if shutil.which(line.program) is None:
        pytest.skip(f"no {line.program} here")
    if line.words[:2] == ["docker", "run"]:  # what follows the image is for its entry point
        parse(cli, "memoir", ["serve", *line.words[line.words.index("memoir") + 1 :]])
    (tmp_path / "memoir.yaml").write_text("\n".join(blocks(KUBERNETES, "yaml")[0][1]))
    (tmp_path / "Dockerfile").write_text("\n".join(blocks(DOCKER, "dockerfile")[0][1]))
    nobody = {"DOCKER_HOST": "tcp://127.0.0.1:9", "DOCKER_BUILDKIT": "0", "KUBECONFIG": str(tmp_path / "none")}

    def said(words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, **nobody}, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        return done.stdout + done.stderr

    assert "onnect" in said(line.words)
    assert "onnect" not in said([*line.words[:2], "--no-such-flag", *line.words[2:]])
