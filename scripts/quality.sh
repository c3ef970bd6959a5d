#!/bin/sh
# The records behind benchmarks/quality.md: sh scripts/quality.sh RECORDS TRAINED BABI [MODEL...]
# TRAINED is the folder that recipes/builtin/methods.sh filled. A killed run goes on if repeated.
set -eu
records=$1 trained=$2 babi=$3
shift 3

ask() { # MODEL LIMIT, then strategies: the collection's 2,500 questions, and LIMIT of each of the six bAbI tasks
    model=$1 limit=$2
    shift 2
    for task in builtin "babi:path=$babi,task=1" "babi:path=$babi,task=6" "babi:path=$babi,task=9" \
        "babi:path=$babi,task=12" "babi:path=$babi,task=15" "babi:path=$babi,task=2,sentences=5"; do
        # longer documents in task 2, whose stories have up to 88 statements: links were trained for 18 documents
        case $task in builtin) number=2500 ;; *) number=$limit ;; esac
        kvilt evaluate run "$task" --limit "$number" --model "$model" --out "$records/$(basename "$model")" "$@" > /dev/null
    done
}

wrapper() { echo "$1:wrapper=$trained/$2/wrapper.safetensors"; }

[ $# -gt 0 ] || set -- builtin full kvlink0 kvlink1 kvlink5
for name in "$@"; do
    case $name in
    builtin)
        ask builtin 100 -s naive -s epic:tokens=8 \
            -s "$(wrapper kv_packet packet)" -s "$(wrapper kv_packet packet_biography)" -s "$(wrapper kv_packet packet_babi)" \
            -s "$(wrapper linked_packet linked)" -s "$(wrapper linked_packet linked_tail)"
        ;;
    full) ask builtin 500 -s full ;;
    kvlink*) ask "$trained/$name" 100 -s "kvlink:links=${name#kvlink}" ;;
    anchors*) ask "$trained/$name" 100 -s anchors:links=5 ;; # for benchmarks/methods.md
    *) echo "unknown model: $name" >&2; exit 2 ;;
    esac
done
