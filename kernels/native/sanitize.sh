#!/usr/bin/env bash
# Tests the C++ kernels, built for this processor with the address and undefined-behaviour sanitizers in a
# folder of their own, and their teams of threads with the thread sanitizer:
# kernels/native/sanitize.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
g++ -std=c++17 -O1 -g -pthread -fsanitize=thread tests/native_team.cpp -o "$folder/team"
TSAN_OPTIONS=halt_on_error=1 "$folder/team"
flags="-fPIC -std=c++17 -O1 -g -fopenmp -march=native -fsanitize=address,undefined"
flags="$flags -fno-sanitize-recover=undefined"
for source in kernels/native/*.cpp; do
    echo "$flags -c $source -o $folder/$(basename "$source" .cpp).o"
done | xargs --max-procs "$(nproc)" --max-lines=1 g++
g++ -shared $flags "$folder"/*.o -o "$folder/_portable.so"
# Leaks are not looked for: Python's own would be reported.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 DARTS_NATIVE_FOLDER="$folder" \
    python -m pytest -n0 -q tests/test_kernels.py tests/test_native.py -k "native and not large" "$@"
