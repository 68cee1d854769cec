#!/usr/bin/env bash
# Make this project's bundles of one random checkpoint for cpu_peers.py: cpu_bundles.sh CHECKPOINT OUT [NAME]...
#
# Rounded to the nearest, the tower's ranges from two samples: neither speed nor size depends on values. NAME is one of
# int4, int4-prompts, int4-float-tower and int8; without any, all. What exists already is left as it is. About 6 GB.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoint=$1 out=$2
names=" ${*:3} "
mkdir -p "$out"
int4=(--scheme w4a16-rtn --symmetric --group-size 128)
tower=(--vision int8 --samples 2 --calibrator minmax --no-smooth --vision-cosine 0)
bundle() { # bundle NAME EXPORT_OPTIONS -- QUANTIZE_OPTIONS
    local name=$1 export=()
    shift
    while [ "$1" != -- ]; do
        export+=("$1")
        shift
    done
    shift
    if [ "$names" != "  " ] && [[ "$names" != *" $name "* ]]; then return; fi
    if [ -e "$out/$name" ]; then return; fi
    internvl-edge quantize "$checkpoint" -o "$out/$name-checkpoint" "$@"
    internvl-edge export "$out/$name-checkpoint" -o "$out/$name" --dialect onnxruntime "${export[@]}"
    rm -r "$out/$name-checkpoint"
}
bundle int4-float-tower -- "${int4[@]}" --lm-head int8
bundle int4 -- "${int4[@]}" --lm-head int8 "${tower[@]}"
bundle int4-prompts --int8-prompts -- "${int4[@]}" --lm-head int4 "${tower[@]}"
bundle int8 -- --scheme w8a16 --no-compensate --lm-head int8 "${tower[@]}"
