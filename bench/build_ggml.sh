#!/usr/bin/env bash
# Build ggml's CPU libraries for bench/ggml.py into build/ggml/lib, for this CPU, from the sources in the sdist of
# llama-cpp-python. Needs a C++ compiler, cmake and, once, the network: an 80 MB download and two minutes on two cores.
#   bench/build_ggml.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
readonly release=0.3.36 python="${1:-python3}" folder=build/ggml
mkdir -p "$folder/lib"
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$release"
tar -xzf "$folder/llama_cpp_python-$release.tar.gz" -C "$folder"
readonly ggml="$folder/llama_cpp_python-$release/vendor/llama.cpp/ggml"
touch "$ggml/ggml.pc.in" # missing from the sdist; cmake only copies it
cmake -S "$ggml" -B "$folder/cmake" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
    -DGGML_STANDALONE=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
cmake --build "$folder/cmake" --parallel "${MAX_JOBS:-2}" --target ggml-cpu
cp -L "$folder"/cmake/src/libggml-base.so "$folder"/cmake/src/libggml-cpu.so "$folder/lib/"
