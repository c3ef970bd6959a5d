#!/bin/sh
# What ships beside the built-in model, and what benchmarks/quality.md measures: sh recipes/builtin/methods.sh OUT BABI [NAME...]
# NAME is one of the trainings below (default: all). A killed run goes on if repeated.
set -eu
out=$1 babi=$2
shift 2
export PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}"
[ -d "$out/rows" ] || python -m builtin.rows --out "$out/rows" --babi "$babi"
[ -d "$out/few" ] || python -m builtin.rows --out "$out/few" --babi "$babi" --count 1000

# Wrappers: the model is frozen, a teacher answers every prompt once, so a thousand rows of each kind are enough.
wrapper() {
    verb=$1 name=$2
    shift 2
    kvilt train "$verb" --model builtin --out "$out/$name" --set batch=32 --set micro_batch=16 --set views=1 --set fewest=0 \
        --set evaluate_every=25 --set patience=6 "$@"
}
# KVLink: every weight is trained, from the data's own answers.
kvlink() {
    name=$1 model=$2
    shift 2
    kvilt train kvlink --model "$model" --out "$out/$name" --set slots=18 --set max_tokens=2048 \
        --set steps=1000 --set batch=16 --set micro_batch=8 --set optimizer=muon --set lr=3e-3 --set evaluate_every=100 --set patience=20 "$@"
}
questions="qa:$out/rows/biography.jsonl@2 qa:$out/rows/stories.jsonl@1 qa:$out/rows/babi.jsonl@1"
copies="qa:$out/rows/copies.jsonl"
all="$out/few/biography.jsonl@2 $out/few/stories.jsonl@1 $out/few/babi.jsonl@1"

[ $# -gt 0 ] || set -- kvlink0 kvlink1 kvlink5 packet linked linked_tail packet_biography packet_babi
for name in "$@"; do
    # shellcheck disable=SC2086
    case $name in
    kvlink0) kvlink "$name" builtin --set links=0 $questions ;;
    kvlink1) kvlink "$name" builtin --set links=1 --set "init= She" $questions ;;
    kvlink5) kvlink "$name" builtin --set links=5 --set "init= She| lives in| studied at| works for| enjoys" $questions ;;
    # Anchors: from kvlink5 on, documents are first said again from a quarter of their rows (repeat), then questions are answered:
    # anchors8 keeps a quarter of the rows, anchors16 half, anchors24 three quarters.
    repeat) kvlink "$name" "$out/kvlink5" --set links=5 --set chunk=32 --set anchors=8 --set steps=600 --set batch=32 --set micro_batch=16 --set held_out=0.01 $copies ;;
    anchors*) kvlink "$name" "$out/repeat" --set links=5 --set chunk=32 --set "anchors=${name#anchors}" --set steps=600 $questions "$copies@1" ;;
    packet) wrapper packet packet --set steps=250 $all ;;
    linked) wrapper linked-packet linked --set "start=$out/packet/wrapper.safetensors" --set links=5 --set steps=300 $all ;;
    linked_tail) wrapper linked-packet linked_tail --set "start=$out/packet/wrapper.safetensors" --set links=8 --set layout=tail --set steps=200 $all ;;
    packet_biography) wrapper packet packet_biography --set steps=100 "$out/few/biography.jsonl" ;;
    packet_babi) wrapper packet packet_babi --set steps=100 "$out/few/babi.jsonl" ;;
    *) echo "unknown training: $name" >&2; exit 2 ;;
    esac
done
