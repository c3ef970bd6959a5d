#!/bin/sh
# The records behind benchmarks/quality.md: sh scripts/quality.sh RECORDS TRAINED BABI [MODEL...]
# TRAINED is the folder that recipes/builtin_methods.sh filled. A killed run goes on if repeated.
set -eu
records=$1 trained=$2 babi=$3
shift 3

ask() { # MODEL, then strategies: the collection's 2,500 questions, and 500 of each of the six bAbI tasks
    model=$1
    shift
    kvilt evaluate run builtin --model "$model" --out "$records/$(basename "$model")" "$@" > /dev/null
    for task in 1 6 9 12 15; do
        kvilt evaluate run "babi:path=$babi,task=$task" --limit 500 --model "$model" --out "$records/$(basename "$model")" "$@" > /dev/null
    done # longer documents in task 2, whose stories have up to 88 statements: links were trained for 18 documents
    kvilt evaluate run "babi:path=$babi,task=2,sentences=5" --limit 500 --model "$model" --out "$records/$(basename "$model")" "$@" > /dev/null
}

wrapper() { echo "$1:wrapper=$trained/$2/wrapper.safetensors"; }

[ $# -gt 0 ] || set -- builtin kvlink0 kvlink1 kvlink5
for name in "$@"; do
    case $name in
    builtin)
        ask builtin -s naive -s block:sink=system -s epic:tokens=8 \
            -s "$(wrapper kv_packet packet)" -s "$(wrapper kv_packet packet_biography)" -s "$(wrapper kv_packet packet_babi)" \
            -s "$(wrapper linked_packet linked)" -s "$(wrapper linked_packet linked_tail)"
        ;;
    kvlink*) ask "$trained/$name" -s "kvlink:links=${name#kvlink}" ;;
    *) echo "unknown model: $name" >&2; exit 2 ;;
    esac
done
