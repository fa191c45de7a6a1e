"""Builds an image's steps in clean Debian 12 roots and runs its entry point there, where no container engine is.

What is rehearsed: every RUN, COPY, ENV, WORKDIR and USER of a target's stages, in a chroot with its own mounts, so
that missing packages, wrong paths, wrong rights and a wrong size show. What is not: layers, the base image itself (a
fresh debootstrap stands in for it, without documentation as in Debian's slim images), limits, networks. Needs root and
debootstrap. Run by `make images`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/images"
SUITE = "bookworm"
# Lent to each RUN and never part of the image: how this machine reaches its package servers.
LENT = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf")
LENT_CA = "/run/lent-ca.pem"
LARGE_MB = 4.0
# What Debian's slim images leave out as well, and the caches of apt that its images for containers do not keep.
NO_CACHES = """\
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke {"rm -f /var/cache/apt/archives/*.deb";};
"""
SLIM = "\n".join(
    f"path-exclude /usr/share/{name}/*" for name in ("doc", "man", "info", "locale", "groff", "lintian", "linda")
)


class RehearsalError(Exception):
    """Which step of which file cannot be rehearsed, or failed."""


@dataclass(slots=True)
class Stage:
    """A root under construction, and what its instructions have set so far."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        """Give the place on this machine of a path in the image."""
        return self.root / str(Path(self.workdir) / path).lstrip("/")


class Rehearsal:
    """Stages of one Dockerfile, built in order up to a target."""

    def __init__(self, dockerfile: Path, work: Path) -> None:
        self._steps = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes())).structure
        self._work = work
        self._args: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}

    def build(self, target: str) -> Stage:
        """Build the target and what it is made of. Raises RehearsalError naming the step."""
        needed = self._needed(target)
        stage: Stage | None = None
        for step in self._steps:
            instruction, value = step["instruction"], step["value"]
            if instruction == "COMMENT":
                continue
            if instruction == "FROM":
                stage = self._from(value) if self._name(value) in needed else None
                continue
            if instruction == "ARG" and not self._stages:
                name, _, default = value.partition("=")
                self._args[name] = default
            elif stage is not None:
                print(f"  {instruction} {value[:110]}", file=sys.stderr)
                self._step(stage, instruction, value, step["startline"] + 1)
        return self._stages[target]

    def _needed(self, target: str) -> set[str]:
        """List the stages that a target is made of, itself included."""
        made_of: dict[str, set[str]] = {}
        name = ""
        for step in self._steps:
            if step["instruction"] == "FROM":
                name = self._name(step["value"])
                made_of[name] = {step["value"].split()[0]}
            elif step["instruction"] == "COPY" and (found := re.match(r"--from=(\S+)", step["value"])):
                made_of[name].add(found[1])
        if target not in made_of:
            raise RehearsalError(f"no stage {target!r}; there are {', '.join(made_of)}")
        needed, open_names = set(), {target}
        while open_names:
            needed |= open_names
            open_names = {part for each in open_names for part in made_of[each] if part in made_of} - needed
        return needed

    @staticmethod
    def _name(value: str) -> str:
        words = value.split()
        return words[2] if len(words) == 3 else words[0]

    def _from(self, value: str) -> Stage:
        base, name = value.split()[0], self._name(value)
        stage = Stage(self._work / name)
        if base in self._stages:
            made = self._stages[base]
            copy_tree(made.root, stage.root)
            stage.env, stage.workdir, stage.user = dict(made.env), made.workdir, made.user
        else:
            for arg, default in self._args.items():
                base = base.replace(f"${{{arg}}}", default)
            if not base.startswith(f"debian:{SUITE}"):
                raise RehearsalError(f"{base}: only images on Debian 12 can be rehearsed")
            copy_tree(debian(), stage.root)
        self._stages[name] = stage
        print(f"FROM {value}", file=sys.stderr)
        return stage

    def _step(self, stage: Stage, instruction: str, value: str, line: int) -> None:
        match instruction:
            case "RUN":
                if run(stage, ["/bin/sh", "-c", value]).returncode != 0:
                    raise RehearsalError(f"line {line}: RUN {value[:80]} failed; its last words are above")
            case "COPY":
                self._copy(stage, value.split())
            case "ENV":
                stage.env.update({name: text for name, _, text in (part.partition("=") for part in value.split())})
            case "WORKDIR":
                stage.workdir = str(Path(stage.workdir) / value)
                stage.inside(".").mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = value
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(value)
            case "CMD":
                stage.command = json.loads(value)
            case "LABEL" | "EXPOSE":
                pass
            case _:
                raise RehearsalError(f"line {line}: {instruction} is not rehearsed")

    def _copy(self, stage: Stage, words: list[str]) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self._stages[words.pop(0).removeprefix("--from=")].root
        *sources, destination = words
        to = stage.inside(destination)
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                copy_tree(path, to)
            else:
                place = to / path.name if destination.endswith("/") or len(sources) > 1 else to
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place)


def copy_tree(source: Path, destination: Path) -> None:
    """Copy what a folder holds with links, rights and device files as they are, without Python's caches."""
    destination.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--reflink=auto", f"{source}/.", str(destination)], check=True)
    for cache in [*destination.rglob("__pycache__")]:
        shutil.rmtree(cache)


def run(stage: Stage, command: list[str], *, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, as its user; mounts and what is lent are gone when it ends."""
    root = stage.root
    script = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    env = dict(stage.env)
    lent = {}
    if stage.user == "0":
        lent = {path: path for path in LENT if Path(path).exists()}
        env |= {name: text for name, text in os.environ.items() if name.startswith("PIP_")}  # noqa: TID251
        if "PIP_CERT" in env:
            lent[env["PIP_CERT"]] = env["PIP_CERT"] = LENT_CA
    for path, place in lent.items():
        target = root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        script.append(f"mount --bind {path} {target}")
    env["HOME"] = "/root" if stage.user == "0" else "/tmp"
    settings = [f"{name}={text}" for name, text in env.items()]
    group = stage.user if stage.user == "0" else ""
    chroot = ["chroot", f"--userspec={stage.user}:{group}", str(root), "/usr/bin/env", "-i", "-C", stage.workdir]
    done = subprocess.run(
        ["unshare", "--mount", "/bin/sh", "-ec", "\n".join([*script, 'exec "$@"']), "sh", *chroot, *settings, *command],
        check=False,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    if quiet and done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-20:]), file=sys.stderr)
    return done


def debian() -> Path:
    """Give a fresh Debian root, made once a machine."""
    root = CACHE / SUITE
    if not (root / ".made").exists():
        bootstrap(root)
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(NO_CACHES)
    return root


def bootstrap(root: Path) -> None:
    """Make the root, by debootstrap, as small as Debian's slim images."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    mirror = mirror_of(Path("/etc/apt"))
    subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(root), mirror], check=True, stdout=sys.stderr)
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM + "\n")
    for name in ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt/archives"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    for path in (root / "var/lib/apt/lists").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / ".made").touch()


def mirror_of(apt: Path) -> str:
    """Give the package server that this machine itself uses for Debian."""
    for path in [*apt.glob("sources.list.d/*"), apt / "sources.list"]:
        found = re.search(
            r"^(?:URIs: |deb (?:\[[^\]]*\] )?)(\S+/debian)/?(?:\s|$)", path.read_text() if path.is_file() else "", re.M
        )
        if found:
            return found[1]
    raise RehearsalError("no Debian package server in /etc/apt")


def size_mb(root: Path) -> float:
    """Give what a root takes on disk, in megabytes of 10^6 bytes."""
    return sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir() or path.is_symlink()) / 1e6


def parts_mb(root: Path) -> dict[str, float]:
    """Give what the parts of a root take on disk: Debian's base, what was installed on it, the largest of Python's."""
    packages = [*root.glob("opt/logicrd/venv/lib/python3.*/site-packages/*")]
    base, environment = size_mb(debian()), size_mb(root / "opt/logicrd/venv")
    sizes = {path.name: size_mb(path) if path.is_dir() else path.lstat().st_size / 1e6 for path in packages}
    parts = {"base": base, "installed by apt": size_mb(root) - base - environment, "environment": environment}
    parts |= {name: size for name, size in sorted(sizes.items(), key=lambda each: -each[1]) if size >= LARGE_MB}
    return {name: round(size, 1) for name, size in parts.items()}


def packed_mb(root: Path) -> float:
    """Give what a node would fetch: the same, compressed by gzip as registries keep layers."""
    tar = subprocess.Popen(["tar", "-C", str(root), "-cz", "."], stdout=subprocess.PIPE)
    packed = 0
    with tar:
        while tar.stdout is not None and (block := tar.stdout.read(1 << 20)):
            packed += len(block)
    return packed / 1e6


def main(argv: list[str]) -> int:
    """Rehearse one target; 0 when its steps and its entry point work, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--max-mb", type=float, help="fail above this size on disk")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the entry point, in place of CMD; after --")
    options = parser.parse_args(argv)
    options.arguments = [text for text in options.arguments if text != "--"]
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        check(Rehearsal(options.dockerfile, work).build(options.target), options)
    except RehearsalError as error:
        print(f"error: {options.dockerfile}: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def check(stage: Stage, options: argparse.Namespace) -> None:
    """Print the image's size and user, and run its entry point. Raises RehearsalError for what must not be."""
    size, packed = size_mb(stage.root), packed_mb(stage.root)
    figures = {"target": options.target, "size_mb": round(size, 1), "packed_mb": round(packed, 1), "user": stage.user}
    print(json.dumps({**figures, "parts_mb": parts_mb(stage.root)}), flush=True)
    if options.max_mb is not None and size > options.max_mb:
        raise RehearsalError(f"{size:.0f} MB on disk is above {options.max_mb:.0f}")
    if stage.user == "0":
        raise RehearsalError("runs as root")
    if options.arguments and run(stage, [*stage.entrypoint, *options.arguments], quiet=False).returncode != 0:
        raise RehearsalError(f"{stage.entrypoint} {options.arguments} failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
