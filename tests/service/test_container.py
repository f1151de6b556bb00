"""Dockerfile and compose.yaml, which nobody could build here: what they name exists, and is what the docs say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hi_diffusers.commands.serve import LEAVE_SECONDS, build_parser
from hi_diffusers.service.queueing import STEP_SECONDS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICE: dict[str, Any] = COMPOSE["services"]["hidream"]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def instruction(name: str) -> list[str]:
    """The arguments of an instruction in exec form."""
    (found,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    arguments: list[str] = json.loads(found)
    return arguments


@pytest.mark.parametrize("more", [instruction("CMD"), SERVICE["command"]], ids=["Dockerfile", "compose.yaml"])
def test_the_flags_are_serve_s(more):
    program, script, *flags = instruction("ENTRYPOINT")
    assert (program, script) == ("python", "serve.py") and (ROOT / script).is_file()
    args = build_parser().parse_args([*flags, *more])
    assert args.no_auth or args.api_key, "a server that others reach has keys, or says that it has none"


def test_the_port_is_serve_s():
    port = build_parser().parse_args([]).port
    assert f"EXPOSE {port}" in DOCKERFILE and f":{port}/ready" in DOCKERFILE
    assert SERVICE["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_files_exist_and_the_bundled_model_is_not_left_out():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for line in re.findall(r"^COPY (?:--\S+ )?(.*) \./?$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert not {"assets", "hi_diffusers", "serve.py", "requirements.txt", "constraints.txt"} & set(ignored)


def test_docker_waits_longer_than_the_server_needs_to_end():
    drain = build_parser().parse_args(SERVICE["command"]).drain_seconds
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > drain + LEAVE_SECONDS + STEP_SECONDS


def test_the_volume_and_the_account_are_the_same_in_both():
    assert "VOLUME /models" in DOCKERFILE and "ENV HF_HOME=/models" in DOCKERFILE
    assert SERVICE["volumes"] == ["models:/models"] and "models" in COMPOSE["volumes"]
    assert DOCKERFILE.index("USER hidream") < DOCKERFILE.index("ENTRYPOINT")


def test_the_docs_name_the_same_commands():
    commands = re.findall(r"^    (docker .*)$", DOCS, re.MULTILINE)
    assert len(commands) == 3
    headers = DOCKERFILE + (ROOT / "compose.yaml").read_text(encoding="utf-8")
    for command in commands:
        assert command in headers, f"{command} is not in the files"
    build = re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"--build-arg (\w+)=", headers)) <= set(build)
    assert set(SERVICE["build"]["args"]) <= set(build)
