# Sourced by local.sh, test.sh and check.sh: makes .venv in the clone and installs the package in it.
# Sets ROOT (the clone) and PYTHON (its interpreter); call `ensure_venv [EXTRA]`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

# The first Python that runs, can make an environment, and is new enough. A name on PATH proves
# little: pyenv's shims stand there for versions that are switched off.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python >= 3.11 with the venv module was found (python3: $(
    python3 --version 2>&1 | head -n 1)). Install one (on Debian or Ubuntu:" \
    "apt-get install python3-venv) and run this again." >&2
  return 1
}

# Installs when setup.py or the clone's place has changed since the last installation that ended
# well: the stamp is written last, so one that was interrupted is taken up again.
ensure_venv() {
  local extra="${1:-}" base
  local stamp="$ROOT/.venv/installed${extra:+-$extra}"
  local wanted
  wanted="$ROOT $(cksum <"$ROOT/setup.py")"
  if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    return
  fi
  # `|| return`: where a caller tests the result, `set -e` is off in here.
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base="$(find_python)" || return 1
    echo "Making $ROOT/.venv with $("$base" --version)" >&2
    "$base" -m venv --clear "$ROOT/.venv" || return 1
  fi
  echo "Installing beats_jax${extra:+[$extra]} into $ROOT/.venv (a minute or more)" >&2
  "$PYTHON" -m pip install -qq --disable-pip-version-check -e "$ROOT${extra:+[$extra]}" ||
    return 1
  echo "$wanted" >"$stamp"
  echo "$wanted" >"$ROOT/.venv/installed" # every extra brings the package itself
}
