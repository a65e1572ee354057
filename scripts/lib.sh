# Shared by the scripts: where we are, how to say things, how to install what is missing.
# Sourced, never run.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
# Colours a run of tests cannot be told apart by are noise in a log.
# Used by the scripts that source this.
# shellcheck disable=SC2034
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
CACHE=${OPTIMUS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/optimus}
# shellcheck disable=SC2034
TOOLS=$CACHE/tools

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

# need COMMAND PACKAGE...: makes sure COMMAND is there, installing Debian packages when root.
need() {
  local command=$1; shift
  have "$command" && return
  is_root || fail "\`$command\` is missing. Install it, as root: apt-get install $*"
  have apt-get || fail "\`$command\` is missing and there is no apt-get; install the equivalent of: $*"
  say "installing $*"
  apt_refresh
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null
  have "$command" || fail "\`$command\` is still missing after installing $*"
}

# One `apt-get update` per run at most.
apt_refresh() {
  [ -n "${APT_FRESH:-}" ] && return
  apt-get update -q >/dev/null
  APT_FRESH=1
}

need_rust() {
  have cargo && return
  [ -x "$HOME/.cargo/bin/cargo" ] && { export PATH=$HOME/.cargo/bin:$PATH; return; }
  fail "Rust is missing. Install Rust 1.95 or later (https://rustup.rs), then run this again"
}

need_cc() { need cc gcc libc6-dev; }
