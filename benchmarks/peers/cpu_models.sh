#!/usr/bin/env bash
# Make the peers' files of one random checkpoint: cpu_models.sh CHECKPOINT FLOAT_VISION.onnx PEERS OUT NAME...
#
# CHECKPOINT is random_checkpoint.py's 1B, FLOAT_VISION.onnx the tower of its export, PEERS holds the environments that
# make_env.sh made. NAME is one of transformers, llama-cpp, openvino-genai, openvino-genai-int8 and onnxruntime-genai.
# What exists already is left as it is. About 6 GB.
set -euo pipefail
if [ $# -lt 5 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoint=$1 vision=$2 peers=$3 out=$4
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
once() { # once RESULT COMMAND...: the result exists when the command has succeeded, and is RESULT.new until then
    if [ -e "$1" ]; then return; fi
    rm -rf "$1.new"
    "${@:2}"
    if [ -e "$1.new" ]; then mv "$1.new" "$1"; fi
}
for name in "${@:5}"; do
    if [ "$name" != llama-cpp ]; then
        once "$out/text" "$peers/${name%-int8}/bin/python" "$here/cpu_text_model.py" "$checkpoint" "$out/text.new"
    fi
    case $name in
    transformers) ;;
    llama-cpp) # its converter runs in transformers' environment
        once "$out/gguf/mmproj-q8_0.gguf" "$peers/transformers/bin/python" "$here/cpu_gguf.py" \
            "$peers/llama-cpp/sources/vendor/llama.cpp" "$checkpoint" "$out/gguf"
        once "$out/gguf/text-Q8_0.gguf" "$peers/llama-cpp/bin/python" "$here/cpu_gguf_quantize.py" \
            "$out/gguf/text-f16.gguf" "$out/gguf"
        ;;
    openvino-genai | openvino-genai-int8)
        optimum=("$peers/openvino-genai/bin/optimum-cli" export openvino -m "$out/text" --task text-generation-with-past)
        if [ "$name" = openvino-genai ]; then
            once "$out/openvino-int4" "${optimum[@]}" --weight-format int4 --sym --group-size 64 --ratio 1.0 "$out/openvino-int4.new"
        else
            once "$out/openvino-int8" "${optimum[@]}" --weight-format int8 "$out/openvino-int8.new"
        fi
        once "$out/openvino-vision" "$peers/openvino-genai/bin/python" "$here/cpu_openvino_tower.py" \
            "$vision" "$out/openvino-vision.new"
        ;;
    onnxruntime-genai)
        once "$out/onnxruntime-genai-int4" "$peers/onnxruntime-genai/bin/python" -m onnxruntime_genai.models.builder \
            -m "$out/text" -o "$out/onnxruntime-genai-int4.new" -p int4 -e cpu -c "$out/cache" \
            --extra_options accuracy_level=4 prune_lm_head=true
        ;;
    *)
        echo "cpu_models.sh: no peer $name" >&2
        exit 2
        ;;
    esac
done
