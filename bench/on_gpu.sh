#!/usr/bin/env bash
# Everything that needs a GPU, in one command: `bash bench/on_gpu.sh FOLDER [STAGE ...]`. Without stages it runs them
# all, the slowest (torch.compile unrolls every tap) last; a stage takes less than ten minutes, results are written as
# they come. Those of `coverfast bench` lie in FOLDER/<device>/ and belong under bench/results/; then `coverfast bench
# report` makes the pages.
set -u
stages=(check all more tune choices-3d choices-2d train study compiled)
out=${1:?"usage: bash bench/on_gpu.sh FOLDER [STAGE ...], stages: ${stages[*]}"}
shift
[ $# -gt 0 ] || set -- "${stages[@]}"
device=$out/$(python3 -c "from coverfast.bench.provenance import *; print(folder_of(provenance('cuda')))") || exit
mkdir -p "$device"
status=0
step() {
    echo "== $*"
    "$@" && return
    echo "FAILED ($?): $*" >&2
    status=1
}
measure() { # NAME OPERATOR OPTIONS
    step coverfast bench "${@:2}" --device cuda --save "$device/$1.json"
}
presets=(--preset paper-3d --preset paper-2d)
eager=(--against "coverfast triton" --against "eager A" --against "eager B")
choices=(--against coverfast --against "coverfast contiguous" --against "coverfast graphs" --against "coverfast eager")
for stage in "$@"; do
    case $stage in
    check)
        step python3 -m pytest tests/kernels tests/test_loader.py tests/test_engine.py tests/test_monitor.py tests/test_finetune.py tests/test_distortions.py -q -p no:cacheprovider > >(tee "$out/tests.txt") 2>&1
        step coverfast bench agree --save "$device/agree.json"
        step coverfast bench static --target sm_90 --save "$out/compiler/static.json"
        ;;
    all)
        step coverfast bench all --device cuda --save "$out"
        ;;
    more)
        for dtype in float32 bfloat16; do
            measure "warp-large-$dtype" warp --batch 2 --channels 32 --sizes 128,128,128 --dtype "$dtype" --repeats 20
        done
        measure mov-float32 mov --dtype float32 "${presets[@]}" --repeats 20 "${eager[@]}"
        measure mov-contiguous mov --layout contiguous "${presets[@]}" --against "coverfast triton" --repeats 20
        measure mov-windows-3d mov --batch 2 --sizes 128,128,128 --window 3,5,7,9 --repeats 10 "${eager[@]}"
        measure mov-windows-2d mov --batch 24 --sizes 384,384 --window 3,5,7,9 --repeats 10 "${eager[@]}"
        for channels in 4 16 32; do
            measure "mov-width-$channels" mov --batch 2 --sizes 128,128,128 --channels "$channels" --repeats 10 \
                --against "coverfast triton" --against "eager A"
        done
        measure ncc-128 ncc --batch 2 --sizes 128,128,128 --repeats 20 # windows of 9, in float32
        step coverfast bench launches --save "$device/launches.json"
        ;;
    tune)
        step coverfast bench tune --save "$device/tune-mov.json"
        step coverfast bench tune --level 2 --save "$device/tune-mov-level-2.json"
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
        for name in paper-2d paper-3d gvsl-3d; do
            run=$shards/run-$name
            step coverfast pretrain --preset "$name" --data "$shards/${name#*-}.h5" --iterations 300 --run "$run"
            cp "$run/metrics.jsonl" "$out/train-$name.jsonl"
            cp -r "$run/report" "$out/train-$name-report" 2>/dev/null
        done
        rm -r "$shards"
        measure data data --workers 8
        ;;
    study) # the paper's U-Net on volumes of 96 pixels a side; short runs, which compiling would not pay for
        printf '[finetune]\ncompile = false\n[probe]\ncompile = false\n' > "$out/study-3d.toml"
        step coverfast study transfer --out "$out/study-3d" --config "$out/study-3d.toml" --preset paper-3d --images 48 \
            --test 16 --pretrain-iterations 1500 --iterations 150 --cases 4,8 --seeds 2 --device cuda
        rm -rf "$out"/study-3d/{data,runs}
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
