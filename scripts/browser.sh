#!/usr/bin/env bash
# What the browser tests need: Chromium with its driver and npm (from Debian, where missing and where this is root), and axe-core
# (from npm, into tests/browser/node_modules). Exit code 69: they cannot be had here.
set -euo pipefail
cd "$(dirname "$0")/../tests/browser"
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
command -v npm >/dev/null || missing+=(npm)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the browser tests need ${missing[*]}: install them, or run this as root on Debian" >&2
    exit 69
  fi
  echo "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; } || exit 69
fi
if [ ! -e node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --silent --no-audit --no-fund
fi
