#!/bin/sh
# The records behind benchmarks/methods.md: sh scripts/methods.sh RECORDS BABI [KIND...]
# Every method that needs no training, at several budgets, on the built-in model. A killed run goes on if repeated.
set -eu
records=$1 babi=$2
shift 2
strategies() {
    for name in naive block:sink=system prompt_cache:consecutive=true prompt_cache:slot=64 ape ape:temperature=1,scale=1; do
        echo "-s $name"
    done
    for tokens in 0 2 4 8; do echo "-s epic:tokens=$tokens"; done
    for ratio in 0.1 0.2 0.5; do
        for name in random ranked cacheblend a3 prophetkv infoflow; do echo "-s $name:ratio=$ratio"; done
    done
    for ratio in 0.1 0.2 0.5; do echo "-s ranked:ratio=$ratio,sink=none"; done
    echo "-s cacheblend:ratio=0.2,score=v -s cacheblend:ratio=0.2,stages=3 -s infoflow:ratio=0.2,boundary=2"
    echo "-s sam_kv:init=2,local=4,block=4 -s sam_kv:init=2,local=4,block=4,update=fusion"
}
[ $# -gt 0 ] || set -- one_hop two_hop chunked babi
for kind in "$@"; do
    # shellcheck disable=SC2046
    case $kind in
    babi)
        for task in 1 6 9 12 15 2,sentences=5; do
            kvilt evaluate run "babi:path=$babi,task=$task" --limit 100 --model builtin --out "$records/builtin" $(strategies) > /dev/null
        done
        ;;
    *) kvilt evaluate run "builtin:kind=$kind" --model builtin --out "$records/builtin" $(strategies) > /dev/null ;;
    esac
done
