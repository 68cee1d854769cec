#!/usr/bin/env bash
# Make every peer's files of one random checkpoint: cpu_models.sh CHECKPOINT FLOAT_BUNDLE PEERS OUT
#
# CHECKPOINT is random_checkpoint.py's 1B, FLOAT_BUNDLE its export, PEERS holds the environments that make_env.sh made
# (transformers, llama-cpp, openvino-genai, onnxruntime-genai). What exists already is left as it is. About 6 GB.
set -euo pipefail
if [ $# -ne 4 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoint=$1 bundle=$2 peers=$3 out=$4
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
once() { # once RESULT COMMAND...: the result exists when the command has succeeded
    if [ ! -e "$1" ]; then "${@:2}"; fi
}
once "$out/text" "$peers/transformers/bin/python" "$here/cpu_text_model.py" "$checkpoint" "$out/text"

once "$out/llama_cpp_python" "$peers/llama-cpp/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$out" --requirement "$here/llama-cpp.txt"
once "$out/llama_cpp_python" sh -c "mkdir -p '$out/llama_cpp_python' && tar -xzf '$out'/llama_cpp_python-*.tar.gz \
    --strip-components=1 -C '$out/llama_cpp_python'"
once "$out/gguf/mmproj-q8_0.gguf" "$peers/transformers/bin/python" "$here/cpu_gguf.py" \
    "$out/llama_cpp_python/vendor/llama.cpp" "$checkpoint" "$out/gguf"
once "$out/gguf/text-Q8_0.gguf" "$peers/llama-cpp/bin/python" "$here/cpu_gguf_quantize.py" "$out/gguf/text-f16.gguf" "$out/gguf"

optimum=("$peers/openvino-genai/bin/optimum-cli" export openvino -m "$out/text" --task text-generation-with-past)
once "$out/openvino-int4" "${optimum[@]}" --weight-format int4 --sym --group-size 64 --ratio 1.0 "$out/openvino-int4"
once "$out/openvino-int8" "${optimum[@]}" --weight-format int8 "$out/openvino-int8"
once "$out/openvino-vision/vision-int8.xml" "$peers/openvino-genai/bin/python" "$here/cpu_openvino_tower.py" \
    "$bundle/vision.onnx" "$out/openvino-vision"

once "$out/onnxruntime-genai-int4" "$peers/onnxruntime-genai/bin/python" -m onnxruntime_genai.models.builder -m "$out/text" \
    -o "$out/onnxruntime-genai-int4" -p int4 -e cpu -c "$out/cache" --extra_options accuracy_level=4 prune_lm_head=true
