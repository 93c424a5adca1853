#!/bin/sh
# Cross-compiles the kernels for AArch64 and runs their unit tests under qemu-user.
# Debian packages: g++-aarch64-linux-gnu qemu-user
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
cmake -S "$root" -B "$build" -DSECATEUR_PYTHON=OFF -DSECATEUR_NATIVE_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Release
cmake --build "$build" --parallel 2
qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/native/test_kernels"
