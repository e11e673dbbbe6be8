#!/usr/bin/env bash
# Everything that needs a GPU, in one command: `bash bench/on_gpu.sh FOLDER [STAGE ...]`. Without stages it runs them
# all, the slowest (torch.compile unrolls every tap) last; a stage takes less than ten minutes, results are written as
# they come. What it leaves in FOLDER belongs under bench/results/<device>/.
set -u
stages=(check ops levels windows tune step choices-3d choices-2d train compiled)
out=${1:?"usage: bash bench/on_gpu.sh FOLDER [STAGE ...], stages: ${stages[*]}"}
shift
[ $# -gt 0 ] || set -- "${stages[@]}"
mkdir -p "$out"
status=0
step() {
    echo "== $*"
    "$@" && return
    echo "FAILED ($?): $*" >&2
    status=1
}
measure() { # NAME OPERATOR OPTIONS
    step coverfast bench "${@:2}" --device cuda --save "$out/$1.json"
}
presets=(--preset paper-3d --preset paper-2d)
eager=(--against "coverfast triton" --against "eager A" --against "eager B")
steps=(--against coverfast --against "coverfast eager float32" --against "published A" --against "published B")
steps+=(--against "published A, views ready")
choices=(--against coverfast --against "coverfast contiguous" --against "coverfast graphs" --against "coverfast eager")
for stage in "$@"; do
    case $stage in
    check)
        step python3 -m pytest tests/kernels tests/test_loader.py tests/test_engine.py tests/test_monitor.py -q -p no:cacheprovider > >(tee "$out/tests.txt") 2>&1
        step coverfast bench agree --save "$out/agreement.json"
        step coverfast bench static --target sm_90 --save "$out/static.json"
        ;;
    ops)
        for op in warp compose norm losses views head; do
            measure "$op" "$op" "${presets[@]}" --repeats 20
        done
        for dtype in float32 bfloat16; do
            measure "warp-large-$dtype" warp --batch 2 --channels 32 --sizes 128,128,128 --dtype "$dtype" --repeats 20
        done
        step coverfast bench launches --save "$out/launches.json"
        ;;
    levels)
        for dtype in bfloat16 float32; do
            measure "mov-levels-$dtype" mov --dtype "$dtype" "${presets[@]}" --repeats 20 "${eager[@]}"
        done
        measure mov-levels-contiguous mov --layout contiguous "${presets[@]}" --against "coverfast triton" --repeats 20
        ;;
    windows)
        measure mov-windows-3d mov --batch 2 --sizes 128,128,128 --window 3,5,7,9 --repeats 10 "${eager[@]}"
        measure mov-windows-2d mov --batch 24 --sizes 384,384 --window 3,5,7,9 --repeats 10 "${eager[@]}"
        for channels in 4 16 32; do
            measure "mov-width-$channels" mov --batch 2 --sizes 128,128,128 --channels "$channels" --repeats 10 \
                --against "coverfast triton" --against "eager A"
        done
        ;;
    tune)
        step coverfast bench tune --save "$out/tune-mov.json"
        step coverfast bench tune --level 2 --save "$out/tune-mov-level-2.json"
        ;;
    step)
        for n in 3d 2d; do
            measure "step-$n" step --preset "paper-$n" --profile "${steps[@]}"
        done
        ;;
    choices-*)
        n=${stage#choices-}
        measure "step-choices-$n" step --preset "paper-$n" "${choices[@]}"
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
            cp -r "$shards/run-$n/report" "$out/train-paper-$n-report" 2>/dev/null
        done
        rm -r "$shards"
        step coverfast bench data --workers 8 --save "$out/data.json"
        ;;
    compiled)
        late=(--against "coverfast triton" --against "compiled A" --against FlexAttention --repeats 10)
        measure mov-compiled-3d mov --batch 2 --sizes 128,128,128 --window 5,3 "${late[@]}"
        measure mov-compiled-2d mov --batch 24 --sizes 384,384 --window 7,3,5,9 "${late[@]}"
        measure mov-compiled-levels mov "${presets[@]}" "${late[@]}"
        measure mov-compiled-3d-wide mov --batch 2 --sizes 128,128,128 --window 7,9 "${late[@]}"
        ;;
    *)
        echo "no such stage: $stage" >&2
        status=2
        ;;
    esac
done
exit $status
