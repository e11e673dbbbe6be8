#!/usr/bin/env bash
# Everything that needs a GPU, in one command: `bash bench/on_gpu.sh FOLDER [check] [levels] [windows] [tune] [train]
# [compiled]`. Without stages it runs them all, the slowest (torch.compile unrolls every tap) last; results are written
# as they come. What it leaves in FOLDER belongs under bench/results/<device>/.
set -u
out=${1:?"usage: bash bench/on_gpu.sh FOLDER [check] [levels] [windows] [tune] [train] [compiled]"}
shift
[ $# -gt 0 ] || set -- check levels windows tune train compiled
mkdir -p "$out"
status=0
step() {
    echo "== $*"
    "$@" && return
    echo "FAILED ($?): $*" >&2
    status=1
}
eager=(--against "coverfast triton" --against "eager A" --against "eager B")
for stage in "$@"; do
    case $stage in
    check)
        step python3 -m pytest tests/kernels -m "not slow" -q -p no:cacheprovider > >(tee "$out/tests.txt") 2>&1
        step coverfast bench agree --save "$out/agreement.json"
        step coverfast bench static --target sm_90 --save "$out/static.json"
        ;;
    levels)
        for dtype in bfloat16 float32; do
            step coverfast bench mov --device cuda --dtype "$dtype" --preset paper-3d --preset paper-2d --repeats 20 \
                "${eager[@]}" --save "$out/mov-levels-$dtype.json"
        done
        step coverfast bench mov --device cuda --layout contiguous --preset paper-3d --preset paper-2d \
            --against "coverfast triton" --repeats 20 --save "$out/mov-levels-contiguous.json"
        ;;
    windows)
        step coverfast bench mov --device cuda --batch 2 --size 128,128,128 --window 3,5,7,9 --repeats 10 \
            "${eager[@]}" --save "$out/mov-windows-3d.json"
        step coverfast bench mov --device cuda --batch 24 --size 384,384 --window 3,5,7,9 --repeats 10 \
            "${eager[@]}" --save "$out/mov-windows-2d.json"
        for channels in 4 16 32; do
            step coverfast bench mov --device cuda --batch 2 --size 128,128,128 --window 5 --channels "$channels" \
                --against "coverfast triton" --against "eager A" --repeats 10 --save "$out/mov-width-$channels.json"
        done
        ;;
    tune)
        step coverfast bench tune --save "$out/tune-mov.json"
        step coverfast bench tune --level 2 --save "$out/tune-mov-level-2.json"
        ;;
    train)
        shards=$(mktemp -d)
        step python3 -c "
from coverfast.ingest.phantoms import build_phantoms
build_phantoms('$shards/2d.h5', 2, (512, 512), seed=1, indices=range(24))
build_phantoms('$shards/3d.h5', 3, (160, 160, 128), seed=1, indices=range(4))"
        for n in 2d 3d; do
            step coverfast pretrain --preset "paper-$n" --data "$shards/$n.h5" --iterations 300 --run "$shards/run-$n"
            cp "$shards/run-$n/metrics.jsonl" "$out/train-paper-$n.jsonl"
            cp "$shards/run-$n/report.png" "$out/train-paper-$n.png" 2>/dev/null
        done
        rm -r "$shards"
        ;;
    compiled)
        late=(--against "coverfast triton" --against "compiled A" --against FlexAttention --repeats 10)
        step coverfast bench mov --device cuda --batch 2 --size 128,128,128 --window 5,3 "${late[@]}" \
            --save "$out/mov-compiled-3d.json"
        step coverfast bench mov --device cuda --batch 24 --size 384,384 --window 7,3,5,9 "${late[@]}" \
            --save "$out/mov-compiled-2d.json"
        step coverfast bench mov --device cuda --preset paper-3d --preset paper-2d "${late[@]}" \
            --save "$out/mov-compiled-levels.json"
        step coverfast bench mov --device cuda --batch 2 --size 128,128,128 --window 7,9 "${late[@]}" \
            --save "$out/mov-compiled-3d-wide.json"
        ;;
    *) echo "no such stage: $stage" >&2; status=2 ;;
    esac
done
exit $status
