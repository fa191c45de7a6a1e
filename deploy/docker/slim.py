"""Makes an image's Python environment smaller: drops what no program reads, and keeps one copy of each library.

Wheels bring their libraries along: OpenCV and PyAV the same FFmpeg, OpenCV and Pillow the same libavif. The second copy
becomes a link to the first where both are of one version. OpenCV's own OpenBLAS is for linear algebra, of which the
line asks nothing; Debian's small LAPACK answers instead. FFmpeg's encoders of H.265 and AV1, which the line never uses,
become libraries that refuse. Symbols that no loader asks for go. What a renewed lock no longer fits ends the build with
a sentence. Run by the build stage of worker.Dockerfile; needs Debian's binutils.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

LAPACK = "/usr/lib/x86_64-linux-gnu/liblapack.so.3"
# Libraries of OpenCV, and whose copy is kept.
KEPT = dict.fromkeys(("libavcodec", "libavformat", "libavutil", "libswscale", "libswresample"), "av.libs")
KEPT["libavif"] = "pillow.libs"
# Encoders of FFmpeg: how their functions are called, and what each gives, so that FFmpeg takes it for a failure.
ENCODERS = {"libx265": ("x265_", 0), "libSvtAv1Enc": ("svt_", -1)}
# Tests, stubs, sources and headers: nothing imports them at run time.
DROPPED_FOLDERS = ("tests", "numpy/typing/tests", "numpy/f2py", "numpy/distutils", "numpy/_core/include", "cv2/data")
DROPPED_FILES = ("*.pyi", "*.pyx", "*.pxd", "*.a", "*.h", "*.c")
# Rich shows tracebacks in colour by the first one; the other 500 languages are not spoken here.
LEXERS = {"__init__.py", "_mapping.py", "python.py", "special.py"}
# Botocore describes every service of AWS; the line asks for S3, and for what gives out the keys to it.
SERVICES = {"s3", "sts", "sso", "sso-oidc", "signin"}


def main(site_packages: Path) -> None:
    """Make one environment smaller, by its folder of packages."""
    drop(site_packages)
    for encoder, (prefix, answer) in ENCODERS.items():
        codecs = site_packages / "av.libs"
        hollow(only(codecs, encoder), calls(only(codecs, "libavcodec"), prefix), answer)
    share(site_packages, site_packages / "opencv_python_headless.libs")
    for library in site_packages.rglob("*.so*"):
        if not library.is_symlink():
            strip(library)


def drop(packages: Path) -> None:
    """Remove what is never imported."""
    for name in DROPPED_FOLDERS:
        for folder in [*packages.rglob(name)]:
            shutil.rmtree(folder, ignore_errors=True)
    for pattern in DROPPED_FILES:
        for file in packages.rglob(pattern):
            file.unlink()
    for lexer in (packages / "pygments/lexers").glob("*.py"):
        if lexer.name not in LEXERS:
            lexer.unlink()
    for service in (packages / "botocore/data").glob("*/"):
        if service.name not in SERVICES:
            shutil.rmtree(service)


def hollow(library: Path, functions: list[str], answer: int) -> None:
    """Put a library in its place whose functions do nothing and give `answer`; on x86-64, as the wheels are."""
    body = "".join(f".globl {name}\n.type {name},@function\n{name}: mov ${answer}, %rax\nret\n" for name in functions)
    made = library.with_suffix(".o")
    subprocess.run(["as", "-o", str(made)], input=f"{body}.section .note.GNU-stack\n", text=True, check=True)
    command = ["ld", "-shared", "-soname", library.name, "-z", "noexecstack", "-o", str(library), str(made)]
    subprocess.run(command, check=True)
    made.unlink()


def calls(library: Path, prefix: str) -> list[str]:
    """List the functions of a prefix that a library calls in others. Exits when there are none."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"\bU ({prefix}\w+)", text)
    return found or sys.exit(f"slim: {library.name} calls nothing of {prefix}: take it out of ENCODERS")


def share(packages: Path, libraries: Path) -> None:
    """Let OpenCV use the libraries of others, and remove its own that nothing asks for any more."""
    for name, owner in KEPT.items():
        replace(only(libraries, name), only(packages / owner, name))
    only(libraries, "libopenblas").unlink()
    (libraries / next(name for name in needed(packages / "cv2/cv2.abi3.so") if "openblas" in name)).symlink_to(LAPACK)
    # A library looks for its own ones beside the link by which it was found.
    for library in (packages / "av.libs").iterdir():
        if not (libraries / library.name).exists():
            (libraries / library.name).symlink_to(Path("..", "av.libs", library.name))
    asked = closure(packages / "cv2/cv2.abi3.so", libraries)
    for library in [*libraries.iterdir()]:
        if library.name not in asked:
            library.unlink()


def replace(library: Path, other: Path) -> None:
    """Put a link to another copy in a library's place. Exits when they are of different versions."""
    if version(library) != version(other):
        sys.exit(f"slim: {library.name} and {other.name} differ: take the library out of KEPT, or renew the lock")
    library.unlink()
    library.symlink_to(Path("..", other.parent.name, other.name))


def version(library: Path) -> list[str]:
    """Give the first two numbers behind `.so.`, which are those of the interface."""
    return library.name.partition(".so.")[2].split(".")[:2]


def only(folder: Path, name: str) -> Path:
    """Give the one library of a name. Exits when there is none, or two."""
    found = [path for path in folder.glob(f"{name}*") if re.match(rf"{name}(p-r0)?-", path.name)]
    if len(found) != 1:
        sys.exit(f"slim: {len(found)} libraries {name} in {folder}, not one")
    return found[0]


def closure(program: Path, libraries: Path) -> set[str]:
    """Name what a library needs of a folder, and what that needs."""
    asked: set[str] = set()
    open_files = [program]
    while open_files:
        for name in needed(open_files.pop()) - asked:
            if (libraries / name).is_symlink() or (libraries / name).exists():
                asked.add(name)
                if (libraries / name).exists():  # Debian's are not there while the environment is built
                    open_files.append(libraries / name)
    return asked


def strip(library: Path) -> None:
    """Remove a library's symbols, unless it could not be loaded then: `strip` garbles some that wheels have patched."""
    stripped = library.with_name(f"{library.name}.stripped")
    subprocess.run(["strip", "--strip-unneeded", "-o", str(stripped), str(library)], check=True)
    if is_aligned(stripped) and stripped.stat().st_size < library.stat().st_size:
        stripped.replace(library)
    else:
        stripped.unlink()


def is_aligned(library: Path) -> bool:
    """Say whether the loader can map every segment: its place in the file and in memory agree within a page."""
    text = subprocess.run(["readelf", "-lW", str(library)], capture_output=True, text=True, check=True).stdout
    segments = re.findall(r"^\s*LOAD\s+(0x\w+)\s+(0x\w+).*(0x\w+)\s*$", text, re.M)
    return all((int(offset, 16) - int(address, 16)) % int(align, 16) == 0 for offset, address, align in segments)


def needed(library: Path) -> set[str]:
    """Give the names of the libraries that one asks for."""
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
