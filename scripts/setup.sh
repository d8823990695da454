#!/usr/bin/env bash
# Make .venv with everything `make demo`, `make test` and `make check` need. Does nothing when that is there already.
#
#   scripts/setup.sh [cpu|cuda]
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-cpu}
stamp=.venv/.ready-$extra-$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)
[ ! -e "$stamp" ] || exit 0

fail() { printf '\nset-up stopped: %s\n' "$1" >&2; exit 1; }
step() { printf '  %s …\n' "$1"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
quietly() { "$@" > .venv/setup.log 2>&1; }
last_words() { tail -n 3 .venv/setup.log | tr '\n' ' '; }

echo "Setting up .venv (about two minutes and 4 GB, once):"

python=""
for candidate in python3 python3.12 python3.11 python3.13; do
  if command -v "$candidate" > /dev/null && "$candidate" -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2> /dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed and none was found; on Debian or Ubuntu run: apt-get install python3 python3-venv"

missing() { ! ldconfig -p 2> /dev/null | grep -q "lib$1\.so\.1"; }

# vLLM's CPU build links libnuma, and torch compiles a few small kernels when it starts.
packages=""
command -v g++ > /dev/null || packages="$packages g++"
! missing numa || packages="$packages libnuma1"
"$python" -c 'import ensurepip' 2> /dev/null || packages="$packages python3-venv"
# Only tests need these, so nobody is asked for them: Mooncake's libraries (the GPU build of Mooncake is another package),
# iproute2 for two hosts on one machine, which needs root, an etcd, and libfaketime for wall clocks that jump.
extras=$extra,dev,nixl,etcd,trace
[ "$extra" != cpu ] || extras=$extras,ray # 240 MB; tests start small clusters
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  ! missing ibverbs || packages="$packages libibverbs1"
  ! missing rdmacm || packages="$packages librdmacm1"
  { command -v ip > /dev/null && command -v tc > /dev/null; } || packages="$packages iproute2"
  { command -v etcd > /dev/null && command -v etcdctl > /dev/null; } || packages="$packages etcd-server etcd-client"
  ls /usr/lib/*/faketime/libfaketime.so.1 > /dev/null 2>&1 || packages="$packages libfaketime"
  [ "$extra" != cpu ] || extras=$extras,mooncake
elif [ "$extra" = cpu ] && ! missing ibverbs && ! missing rdmacm; then
  extras=$extras,mooncake
fi
if [ -n "$packages" ]; then
  step "Debian packages:$packages"
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    mkdir -p .venv
    { quietly apt-get update && DEBIAN_FRONTEND=noninteractive quietly apt-get install -y --no-install-recommends $packages; } \
      || fail "apt-get could not install$packages: $(last_words)"
  else
    fail "these packages are missing:$packages; run: sudo apt-get install$packages"
  fi
fi

if [ ! -x .venv/bin/python ]; then
  step "virtual environment"
  "$python" -m venv .venv || fail "$python could not make a virtual environment in .venv"
fi

if [ "$extra" = cpu ]; then
  # First and alone: asked for later, as somebody's requirement, torch would come as gigabytes of CUDA.
  step "torch for the CPU"
  torch=torch==2.13.0+cpu
  quietly pip install "$torch" \
    || quietly pip install "$torch" --index-url https://download.pytorch.org/whl/cpu \
    || fail "pip could not install $torch, neither from its own indexes nor from download.pytorch.org: $(last_words)"
fi

step "vllm-fleet with [$extras], vLLM included"
quietly pip install -e ".[$extras]" || fail "pip could not install vllm-fleet[$extras]: $(last_words)"

if [ "$extra" = cpu ]; then
  # PyPI builds these for CUDA torch. vLLM's CPU build requires them but runs without; broken ones break transformers.
  for package in torchvision torchaudio torchcodec; do
    .venv/bin/python -c "import $package" > /dev/null 2>&1 || quietly pip uninstall -y "$package" || true
  done
fi

step "a first import of vLLM"
quietly .venv/bin/python -c 'import vllm.entrypoints.openai.api_server' \
  || fail "vLLM is installed but cannot be imported: $(last_words)"
rm -f .venv/.ready-*
touch "$stamp"
echo "  done."
