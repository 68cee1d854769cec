#!/usr/bin/env bash
# llama.cpp for make_env.sh: llama-cpp.sh DIR builds llama-cpp-python's own sources once, as `pip install` would, and
# llama-server with them: DIR/sources, DIR/build/bin/llama-server. A stopped build continues when it is started again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
env=$(cd "$1" && pwd)
"$env/bin/pip" install --quiet --no-compile cmake ninja
if [ ! -e "$env/sources/CMakeLists.txt" ]; then
    rm -rf "$env/download" "$env/sources"
    "$env/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$env/download" --requirement "$here/llama-cpp.txt"
    mkdir "$env/sources"
    tar -xzf "$env"/download/llama_cpp_python-*.tar.gz --strip-components=1 -C "$env/sources"
    rm -r "$env/download"
fi
flags=""
if grep -q amx_tile /proc/cpuinfo; then
    flags="-include $here/amx_tile_config.h"
    echo "note: llama.cpp is built with AMX and amx_tile_config.h; without it, GCC 12.2 builds a program that crashes"
fi
# What the package's own CMakeLists.txt sets, and the server's page left out: it would be fetched from elsewhere.
"$env/bin/cmake" -S "$env/sources/vendor/llama.cpp" -B "$env/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$env/bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > "$env/cmake.log"
"$env/bin/cmake" --build "$env/build" --target llama mtmd --parallel "$(nproc)" > "$env/build.log"
CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" "$env/bin/pip" install --quiet --no-compile "$env/sources"
package=$("$env/bin/python" -c 'import importlib.util as u; print(u.find_spec("llama_cpp").submodule_search_locations[0])')
mkdir -p "$package/lib"
cp -P "$env"/build/bin/*.so* "$package/lib/"
"$env/bin/cmake" --build "$env/build" --target llama-server --parallel "$(nproc)" >> "$env/build.log"
