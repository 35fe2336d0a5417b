#!/usr/bin/env bash
# Installs a Debian package that some tests need. Nothing happens when one of its commands is there and runs.
#
#   scripts/install_package.sh PACKAGE MEGABYTES COMMAND [COMMAND ...]
#
# Needs root, or sudo without a password; otherwise says what to do.
set -euo pipefail

package=$1 megabytes=$2
shift 2

for name in "$@"; do
  # Runs it rather than looks for it: Ubuntu's chromium-browser is a stub that only tells to install a snap.
  if "$name" --version >/dev/null 2>&1; then
    exit 0
  fi
done

die() {
  printf 'install_package: %s\n' "$*" >&2
  exit 1
}

command -v apt-get >/dev/null || die "no $package on PATH, and no apt-get to install it with; install it by hand"
if [ "$(id -u)" = 0 ]; then
  root=()
elif sudo -n true 2>/dev/null; then
  root=(sudo -n)
else
  die "no $package on PATH, and no right to install it; run: sudo apt-get install $package"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
printf 'install_package: installing %s, %s MB\n' "$package" "$megabytes" >&2
# The lists of packages may be missing (in a container, say) or old.
{
  "${root[@]}" apt-get update &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$package"
} >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  die "apt-get could not install $package; what it said stands above"
}
