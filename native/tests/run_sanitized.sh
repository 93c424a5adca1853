#!/bin/sh
# Builds the kernels and their unit tests with AddressSanitizer and UBSan in a folder of its own, and runs them.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
cmake -S "$root" -B "$build" -DSECATEUR_PYTHON=OFF -DSECATEUR_NATIVE_TESTS=ON \
  -DSECATEUR_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo
cmake --build "$build" --parallel 2
"$build/native/test_kernels"
