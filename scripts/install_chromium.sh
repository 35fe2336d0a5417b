#!/usr/bin/env bash
# Installs Debian's chromium for the tests in a real browser (`make test-browser`). Nothing happens when one is there.
#
#   scripts/install_chromium.sh
#
# Needs root, or sudo without a password; otherwise says what to do. tests/conftest.py looks for the same names.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
  # Runs it rather than looks for it: Ubuntu's chromium-browser is a stub that only tells to install a snap.
  if "$name" --version >/dev/null 2>&1; then
    exit 0
  fi
done

die() {
  printf 'install_chromium: %s\n' "$*" >&2
  exit 1
}

command -v apt-get >/dev/null || die "no chromium on PATH, and no apt-get to install it with; install Chromium or Chrome"
if [ "$(id -u)" = 0 ]; then
  root=()
elif sudo -n true 2>/dev/null; then
  root=(sudo -n)
else
  die "no chromium on PATH, and no right to install it; run: sudo apt-get install chromium"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
printf 'install_chromium: installing chromium, 350 MB\n' >&2
# The lists of packages may be missing (in a container, say) or old.
{
  "${root[@]}" apt-get update &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium
} >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  die "apt-get could not install chromium; what it said stands above"
}
