"""The images' recipes and compose.yaml, read where nothing can build them: pinned, not root, and naming what exists."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import redis
import yaml
from dockerfile_parse import DockerfileParser
from line_process import wait_until
from processes import free_ports

from pipeline import config
from pipeline.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
RECIPES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


def steps(recipe: Path) -> list[tuple[str, str]]:
    """(instruction, value) of a recipe, without comments."""
    parsed = DockerfileParser(fileobj=io.BytesIO(recipe.read_bytes())).structure
    return [(step["instruction"], step["value"]) for step in parsed if step["instruction"] != "COMMENT"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
class TestRecipe:
    def test_base_is_pinned(self, recipe):
        """Every base that is not a stage comes from an ARG with a tag of a version, and Debian's with a digest."""
        stages = {value.split()[2] for kind, value in steps(recipe) if kind == "FROM" and " AS " in value}
        for kind, value in steps(recipe):
            if kind == "FROM":
                assert value.split()[0] in {"${BASE}", *stages}
        base = next(value for kind, value in steps(recipe) if kind == "ARG").removeprefix("BASE=")
        assert ":latest" not in base
        assert re.search(r"@sha256:[0-9a-f]{64}$" if base.startswith("debian") else r":\d+\.\d+-py3$", base)

    def test_last_user_is_a_number_and_not_root(self, recipe):
        """Kubernetes can see that a numeric user is not root; a name it cannot."""
        users = [value for kind, value in steps(recipe) if kind == "USER"]
        assert users
        assert all(int(user) >= 10001 for user in users)
        last_from = max(i for i, (kind, _) in enumerate(steps(recipe)) if kind == "FROM")
        assert any(kind == "USER" for kind, _ in steps(recipe)[last_from:])

    def test_entry_points_get_signals(self, recipe):
        """Exec form: the program is process 1 and hears SIGTERM."""
        for kind, value in steps(recipe):
            if kind in {"ENTRYPOINT", "CMD"}:
                assert isinstance(json.loads(value), list)
        assert any(kind == "ENTRYPOINT" for kind, _ in steps(recipe))

    def test_packages_are_pinned_and_leave_no_lists(self, recipe):
        """pip takes hashes or what this build made; apt keeps no lists; nothing is piped to a shell."""
        for kind, value in steps(recipe):
            if kind != "RUN":
                continue
            for command in re.split(r"&&|\n", value):
                if "pip install" in command:
                    assert "--require-hashes" in command or "wheels/*.whl" in command
            if "apt-get install" in value:
                assert "--no-install-recommends" in value
                assert "rm -rf /var/lib/apt/lists/*" in value
            assert not re.search(r"(curl|wget).*\|\s*(ba)?sh", value)

    def test_copies_what_exists_and_travels(self, recipe):
        """Each source is in the checkout, and .dockerignore lets it through."""
        passed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for kind, value in steps(recipe):
            if kind != "COPY" or value.startswith("--from="):
                continue
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(Path(source).match(pattern) for pattern in passed), f"{source} is not in .dockerignore"

    def test_no_secret_and_no_add(self, recipe):
        """ADD fetches and unpacks unseen; build arguments and variables stay in the image for all to read."""
        for kind, value in steps(recipe):
            assert kind != "ADD"
            if kind in {"ARG", "ENV"}:
                assert not re.search(r"(?i)password|secret|token|api_?key", value)


def test_the_worker_can_share_the_libraries_of_its_wheels():
    """What `slim.py` replaces by links is of one version in the wheels of the lock: a lock that differs shows here."""
    spec = importlib.util.spec_from_file_location("slim", DOCKER / "slim.py")
    slim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slim)
    packages = Path(cv2.__file__).parents[1]
    for name, owner in slim.KEPT.items():
        ours, other = (slim.only(packages / each, name) for each in ("opencv_python_headless.libs", owner))
        assert slim.version(ours) == slim.version(other), name
    for name in slim.ENCODERS:
        slim.only(packages / "av.libs", name)


def test_torch_is_in_the_training_image_only():
    """The line's image installs the line's lock, which has no torch."""
    assert "torch" not in (ROOT / "requirements/pipeline.txt").read_text()
    worker = (DOCKER / "worker.Dockerfile").read_text()
    assert "requirements/pipeline.txt" in worker
    assert "requirements/training.txt" not in worker


def test_compose_builds_from_recipes_with_their_targets():
    """Each build names a recipe that exists, and a stage in it."""
    builds = [service["build"] for service in COMPOSE["services"].values() if "build" in service]
    assert len(builds) == 5
    for build in builds:
        recipe = ROOT / build["dockerfile"]
        stages = [value.split()[2] for kind, value in steps(recipe) if kind == "FROM" and " AS " in value]
        assert build.get("target") is None or build["target"] in stages


def test_compose_images_have_versions():
    """Foreign images are pinned to a version, none floats."""
    images = {service["image"] for service in COMPOSE["services"].values() if "image" in service}
    assert len(images) == 2
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+[\w.-]*", image) for image in images)


def test_compose_waits_for_what_it_needs():
    """Whoever is waited for as healthy says when it is."""
    for service in COMPOSE["services"].values():
        for name, wait in service.get("depends_on", {}).items():
            assert name in COMPOSE["services"]
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in COMPOSE["services"][name]


def test_compose_line_fits_the_services(tmp_path):
    """The line file is valid, its hosts are services of the file, its products are in the repository."""
    text = (DOCKER / "line.yaml").read_text().replace("/models", str(ROOT / "models_repo"))
    (tmp_path / "password").write_text("of-the-test\n")
    text = text.replace("/run/redis", str(tmp_path))
    path = tmp_path / "line.yaml"
    path.write_text(text)
    line = config.load(path)
    hosts = [*line.triton.addresses, *line.kafka.bootstrap, re.sub(r".*//", "", line.redis.url)]
    hosts += [re.sub(r".*//", "", camera.url) for camera in line.cameras]
    assert {re.split("[:/]", host)[0] for host in hosts} == {"triton", "kafka", "redis", "camera"}
    for product in line.products:
        read_manifest(line.triton.models_repo, product)


def test_compose_gives_redis_users_with_passwords(tmp_path):
    """A real Redis with the list that it makes: `line` reads limits, `engineer` sets them, nobody else enters."""
    _, script, acl, out, *users = COMPOSE["services"]["redis-users"]["entrypoint"]
    mounts = dict(each.split(":")[1::-1] for each in COMPOSE["services"]["redis-users"]["volumes"])
    command = ["sh", ROOT / "deploy" / mounts[script], ROOT / "deploy" / mounts[acl], tmp_path, *users]
    assert out == "/users"
    for _ in range(2):  # the second one changes nothing
        subprocess.run(command, check=True, timeout=30)
        passwords = {user: (tmp_path / user / "password").read_text().strip() for user in users}
    assert users == ["line", "engineer"]
    assert len(set(passwords.values())) == 2
    assert all(len(password) == 48 for password in passwords.values())
    (port,) = free_ports(1)
    server = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", tmp_path, "--save", ""]
    with subprocess.Popen([*server, "--aclfile", tmp_path / "server/users.acl"], stdout=subprocess.DEVNULL) as process:
        try:
            key = "logicrd:threshold:tray"
            line, engineer = (redis.Redis(port=port, username=user, password=passwords[user]) for user in users)
            wait_until(lambda: _answers(line, key), 30, "Redis")
            engineer.hset(key, "ng", "4.5")
            assert line.hmget(key, "ng") == [b"4.5"]
            with pytest.raises(redis.exceptions.NoPermissionError):
                line.hset(key, "ng", "9")
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(port=port).ping()
            _, health = COMPOSE["services"]["redis"]["healthcheck"]["test"]
            at_port = health.replace("redis-cli", f"redis-cli -p {port}")
            subprocess.run(["sh", "-c", at_port], check=True, timeout=30)
        finally:
            process.terminate()


def _answers(client, key):
    try:
        client.hmget(key, "ng")
    except redis.ConnectionError:
        return False
    return True


def test_compose_mounts_exist():
    """Every bind mount names a place in the checkout; volumes are declared."""
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]


def test_sbom_lists_what_the_lock_pins(tmp_path):
    """The CycloneDX document made by `make images` has each package of the lock at its version, with its hashes."""
    lock = ROOT / "requirements/triton-image.txt"
    made = tmp_path / "triton.cdx.json"
    tool = [sys.executable, "-m", "cyclonedx_py", "requirements", str(lock), "--output-reproducible"]
    subprocess.run([*tool, "--of", "JSON", "-o", str(made)], check=True, capture_output=True, timeout=120)
    components = {each["name"]: each for each in json.loads(made.read_text())["components"]}
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text(), re.M))
    assert {name: each["version"] for name, each in components.items()} == pinned
    hashes = [found for each in components["numpy"]["externalReferences"] for found in each["hashes"]]
    assert len(hashes) == lock.read_text().count("--hash=sha256:")
