#!/usr/bin/env bash
# Makes the virtual environment and installs ppo_jax into it, editable. Nothing happens when that is already up to date.
#
#   scripts/setup.sh [EXTRA ...]          e.g. scripts/setup.sh test
#
# Needs Python 3.11 or newer with pip, nothing else: not even the venv module, which Debian packages apart. It uses the
# uv on PATH, or fetches one into .cache/uv (Debian's pip refuses a plain install, but not `--target`).
#
# Environment:
#   PYTHON       the interpreter to build on        (default: that of .venv, else the newest on PATH from 3.11 to 3.13)
#   VENV         where                              (default: .venv)
#   ACCELERATOR  cpu, cuda12, cuda13 or tpu         (default: cuda12 if `nvidia-smi -L` lists a GPU, else cpu)
#   RESOLUTION   highest or lowest-direct versions  (default: highest)
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
RESOLUTION=${RESOLUTION:-highest}
STAMP=$VENV/.ppo_jax_installed # four lines: resolution, accelerator, extras, checksum of pyproject.toml

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

say() {
  printf 'setup: %s\n' "$*" >&2
}

# Version and home of the interpreter behind a command; the same for a virtual environment and what it was made from.
# Fails before 3.11. Runs it rather than looks for it: a version manager's shim is on PATH for versions that it refuses.
identify() {
  "$1" -I -S -c '
import sys
sys.exit("too old") if sys.version_info < (3, 11) else print("Python %d.%d.%d" % sys.version_info[:3], sys.base_prefix)
' 2>/dev/null
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if identify "$candidate" >/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer on PATH; name one with PYTHON=/path/to/python"
}

# The extra for this machine's accelerator, or cpu. One that is installed stays, also where the GPU is out of sight (the
# login node of a cluster), until ACCELERATOR names another.
find_accelerator() {
  case ${ACCELERATOR:-} in
  cpu | cuda12 | cuda13 | tpu)
    echo "$ACCELERATOR"
    return
    ;;
  ?*) die "ACCELERATOR=$ACCELERATOR is none of cpu, cuda12, cuda13, tpu" ;;
  esac
  if [ "$installed_accelerator" != cpu ]; then
    echo "$installed_accelerator"
  elif nvidia-smi -L >/dev/null 2>&1; then
    say "NVIDIA GPU found: adding the cuda12 extra, several GB (ACCELERATOR=cpu or cuda13 to choose otherwise)"
    echo cuda12
  else
    echo cpu
  fi
}

# uv reads neither pip's environment nor its configuration files: where pip was told of a package index, tell uv.
adopt_pip_settings() {
  local index=${PIP_INDEX_URL:-}
  if [ -z "$index" ]; then
    index=$("$python" -m pip config get global.index-url 2>/dev/null) || index=
  fi
  if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX=$index
  fi
  if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then
    export SSL_CERT_FILE=$PIP_CERT
  fi
}

find_uv() {
  if uv --version >/dev/null 2>&1; then
    echo uv
    return
  fi
  if ! .cache/uv/bin/uv --version >/dev/null 2>&1; then
    say "fetching uv into .cache/uv"
    # The two settings that some people have would refuse --target.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$python" -m pip install --quiet --disable-pip-version-check --upgrade \
      --target .cache/uv 'uv>=0.8' >&2 ||
      die "pip could not fetch uv; CONTRIBUTING.md has the lines for an installation by hand"
  fi
  echo .cache/uv/bin/uv
}

# What is there. An environment that was made by hand has no stamp, and is installed into.
existing=$(identify "$VENV/bin/python") || existing=''
installed_resolution=$RESOLUTION installed_accelerator=cpu installed='' checksum=''
if [ -n "$existing" ] && [ -f "$STAMP" ]; then
  { read -r installed_resolution && read -r installed_accelerator && read -r installed && read -r checksum; } <"$STAMP" ||
    checksum=''
fi

# What is wanted.
if [ -n "${PYTHON:-}" ]; then
  wanted=$(identify "$PYTHON") || die "PYTHON=$PYTHON is not a working Python 3.11 or newer"
else
  wanted=$existing
fi
accelerator=$(find_accelerator)
all=$(printf '%s\n' $installed "$@" | sort -u | paste -sd' ' -)

fits=no # whether the environment can be installed into, as opposed to made anew
if [ -n "$existing" ] && [ "$existing $installed_resolution" = "$wanted $RESOLUTION" ]; then
  case $installed_accelerator in cpu | "$accelerator") fits=yes ;; esac
fi
current=$(cksum <pyproject.toml)
if [ "$fits $installed_accelerator $installed $checksum" = "yes $accelerator $all $current" ]; then
  exit 0
fi

python=$(find_python)
adopt_pip_settings
uv=$(find_uv)
export UV_PYTHON_DOWNLOADS=never
if [ $fits = no ]; then
  say "making $VENV with $(identify "$python")"
  "$uv" venv --quiet --clear --no-project --python "$("$python" -c 'import sys; print(sys.executable)')" "$VENV"
  all=$*
fi
extras=$(printf '%s\n' $all ${accelerator#cpu} | paste -sd, -)
say "installing ppo_jax${extras:+[$extras]} into $VENV"
# Without the checksum until it is done: an installation that is cut short is taken up again.
printf '%s\n' "$RESOLUTION" "$accelerator" "$all" incomplete >"$STAMP"
"$uv" pip install --python "$VENV/bin/python" --resolution "$RESOLUTION" --editable ".${extras:+[$extras]}"
printf '%s\n' "$RESOLUTION" "$accelerator" "$all" "$current" >"$STAMP"
