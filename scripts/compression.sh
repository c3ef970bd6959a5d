#!/bin/sh
# The records behind benchmarks/compression.md: sh scripts/compression.sh RECORDS TRAINED [MODEL...]
# TRAINED is the folder that recipes/builtin/methods.sh filled. A killed run goes on if repeated.
set -eu
records=$1 trained=$2
shift 2

ask() { # MODEL, then strategies and compressions: 500 questions on one document, 500 across two, into the folder $name
    model=$1
    shift
    for kind in one_hop two_hop; do
        kvilt evaluate run "builtin:kind=$kind" --model "$model" --out "$records/$name" "$@" > /dev/null
    done
}

presses() {
    for name in keydiff knorm leverage cur kvzip random; do echo "--compress $name:keep=0.5"; done
    for keep in 0.75 0.25; do
        for name in keydiff cur kvzip random; do echo "--compress $name:keep=$keep"; done
    done
}

[ $# -gt 0 ] || set -- builtin bfloat16 kvlink5 anchors8 anchors16 anchors24
for name in "$@"; do
    # shellcheck disable=SC2046
    case $name in
    builtin)
        ask builtin -s naive --compress "" --compress int8 --compress int4 --compress fp8 $(presses) --compress cur:keep=0.5+int8
        ask builtin -s "kv_packet:wrapper=$trained/packet/wrapper.safetensors" --compress "" --compress int8 --compress cur:keep=0.5+int8
        ;;
    bfloat16) ask builtin --dtype bfloat16 -s naive --compress "" --compress int8 --compress fp8 ;;
    kvlink5) ask "$trained/kvlink5" -s kvlink:links=5 --compress "" --compress int8 --compress cur:keep=0.5+int8 ;;
    anchors*) ask "$trained/$name" -s anchors:links=5 --compress "" --compress int8 ;;
    *) echo "unknown model: $name" >&2; exit 2 ;;
    esac
done
