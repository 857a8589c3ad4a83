#!/usr/bin/env bash
# What needs a GPU, in one command: tests and benchmarks at the paper's size, in pieces of at most nine minutes.
#
#   benchmarks/gpu.sh                          # all pieces that have not finished
#   benchmarks/gpu.sh --list                   # their commands
#   benchmarks/gpu.sh --piece sampling_16      # one of them
#   benchmarks/gpu.sh --wheels wheels          # install these first, beside what the machine has
#   benchmarks/gpu.sh --device cpu --tiny      # try it out without a GPU: needs minutes, and its figures mean nothing
#
# A piece writes results, a log (NAME.log) and how it ended (NAME.done, NAME.failed) into --output_dir. Call the command
# again after an interruption: finished pieces are skipped, and `flow` goes on from its last checkpoint. It needs this
# checkout, Python with PyTorch and what setup.py names, and no network. The variable PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

readonly PIECES=(tests train_step train_step_compiled flow sampling_1 sampling_16 sampling_64 sampling_learned
    train_reverse latent_memory train_loop fsdp2)
readonly PIECE_SECONDS=540
python=${PYTHON:-python3}
output_dir=outputs/gpu
device=cuda
tiny=false
wheels=
list=false
chosen=()

fail() {
    echo "gpu.sh: error: $*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --list) list=true ;;
        --tiny) tiny=true ;;
        --piece | --device | --output_dir | --wheels)
            (($# > 1)) || fail "$1 needs a value."
            case $1 in
                --piece) chosen+=("$2") ;;
                --device) device=$2 ;;
                --output_dir) output_dir=$2 ;;
                --wheels) wheels=$2 ;;
            esac
            shift
            ;;
        *) fail "there is no option $1. The first lines of $0 show all of them." ;;
    esac
    shift
done
for name in "${chosen[@]}"; do
    [[ " ${PIECES[*]} " == *" $name "* ]] || fail "--piece must be one of ${PIECES[*]}, but is $name."
done
[[ $device == cpu || $device == cuda ]] || fail "--device must be cpu or cuda, but is $device."
((${#chosen[@]})) || chosen=("${PIECES[@]}")

# Sizes. The tiny ones run the same code.
if $tiny; then
    sizes=(--sample_size 8 --patch_size 4 --num_blocks 2 --num_layers 1 --num_attention_heads 1 --attention_head_dim 8)
    alignment=(--aligned_blocks 1 2 --aligned_layer 1 --teacher_dim 8 --projector_dim 8)
    step=(--batch_size 2 --repeats 1)
    trained_flow=(--num_blocks 2 --num_layers 1 --num_attention_heads 1 --max_train_steps 2 --train_batch_size 2
        --num_train_images 40)
    sampling=(--repeats 1)
    largest_batch=2
    learned=(--num_layers 1 --max_train_steps 2 --train_batch_size 2 --max_validation_samples 2)
    uncompiled=(env TORCHDYNAMO_DISABLE=1)
    latents=(--configs demo_digits --batch_size 2 --repeats 1)
    loop=(--batch_size 2 --num_steps 2 --repeats 1 --image_size 32)
    sharded=(--model_config training/configs/demo_shapes.json --train_batch_size 2 --max_train_steps 2 --logging_steps 1
        --max_validation_samples 2)
else
    sizes=(--sample_size 64 --patch_size 4 --num_blocks 8 --num_layers 8 --num_attention_heads 16)
    alignment=(--aligned_blocks 7 8 --aligned_layer 6)
    step=(--batch_size 32 --repeats 10)
    trained_flow=(--num_blocks 8 --num_layers 8 --num_attention_heads 16 --learning_rate 1e-4)
    sampling=(--repeats 3 --compile)
    largest_batch=64
    learned=(--train_batch_size 32 --max_train_steps 100 --lr_warmup_steps 20 --max_validation_samples 64)
    uncompiled=()
    latents=(--batch_size 32)
    loop=(--batch_size 32 --num_steps 50 --repeats 1)
    sharded=(--model_config training/configs/imagenet64_p4.json --train_batch_size 32 --max_train_steps 20
        --logging_steps 5 --max_validation_samples 64)
fi
readonly flow=$output_dir/benchmark_flow

# Runs a command of a piece within what is left of its time, or only shows it.
run() {
    if $list; then
        printf '%s:' "$name"
        printf ' %q' "$@"
        printf '\n'
    else
        timeout --kill-after 30 $((PIECE_SECONDS + started - SECONDS)) "$@" &
        child=$!
        wait "$child"
    fi
}

train_step() {
    run "$python" benchmarks/train_step.py "${sizes[@]}" "${alignment[@]}" "${step[@]}" --dtype bfloat16 \
        --device "$device" --output "$output_dir/$name.json" "$@"
}

sample() {
    local batch_size=$(($1 < largest_batch ? $1 : largest_batch))
    run "$python" benchmarks/sampling.py --model "$flow/flow" --batch_sizes "$batch_size" --guidance_scales 2 \
        "${sampling[@]}" --device "$device" --output "$output_dir/$name.json"
}

run_piece() {
    case $name in
        tests) run "$python" -m pytest -k cuda tests/test_cuda.py tests/models/test_inverse_solvers.py ;;
        # All strategies but the sequential graph, which does not fit at this size.
        train_step)
            train_step --modes eager --steps none forward detach "reverse 0" "reverse 1" "reverse 2" \
                "reverse 0, two evaluations" "reverse 1, two evaluations" "reverse 2, two evaluations"
            ;;
        train_step_compiled)
            train_step --modes eager compiled "compiled below" --steps none forward detach "reverse 0" "reverse 1"
            ;;
        flow)
            run "$python" benchmarks/prepare_flow.py "${trained_flow[@]}" --output_dir "$flow" &&
                run rm -rf "$flow"/flow/checkpoint-* # 13 GB each at the paper's size
            ;;
        sampling_learned)
            run "${uncompiled[@]}" "$python" benchmarks/sampling.py --learned --model "$flow/flow" \
                --batch_sizes 1 $((largest_batch < 16 ? largest_batch : 16)) --guidance_scales 2 \
                --device "$device" --output "$output_dir/$name.json"
            ;;
        sampling_*) sample "${name#sampling_}" ;;
        # The images are those of the piece `flow`.
        train_reverse)
            run "$python" benchmarks/reverse_step.py "${sizes[@]}" "${step[@]}" --dtype bfloat16 --device "$device" \
                --output "$output_dir/$name.json" &&
                run "$python" training/train_reverse.py --model "$flow/flow" --train_data_dir "$flow/shapes/images" \
                    "${learned[@]}" --mixed_precision bf16 --resume_from_checkpoint latest \
                    --output_dir "$output_dir/learned_inverse"
            ;;
        latent_memory)
            run "$python" benchmarks/latent_train_step.py "${latents[@]}" --output "$output_dir/latent_train_step.json" &&
                run "$python" benchmarks/latent_train_step.py "${latents[@]}" --gradient_checkpointing \
                    --output "$output_dir/latent_train_step_checkpointing.json"
            ;;
        train_loop)
            run "$python" benchmarks/train_loop.py "${sizes[@]}" "${loop[@]}" --mixed_precision bf16 \
                --folder "$output_dir" --device "$device" --output "$output_dir/$name.json"
            ;;
        # The images and the teacher are those of the piece `flow`.
        fsdp2)
            run env ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP \
                "$python" -m torch.distributed.run --standalone --nproc_per_node 1 training/train_rra.py \
                --train_data_dir "$flow/shapes/images" --teacher_model_name_or_path "$flow/shapes/teacher" \
                "${sharded[@]}" --mixed_precision bf16 --resume_from_checkpoint latest --output_dir "$output_dir/$name"
            ;;
    esac
}

# Read whole before it runs, so that a new version of this file does not change a run.
main() {
    if $list; then
        for name in "${chosen[@]}"; do
            run_piece
        done
        exit
    fi

    [[ -z $wheels || -d $wheels ]] || fail "--wheels must be a folder, but $wheels is none."
    output_dir=$(realpath -m "$output_dir")
    export PYTHONPATH=$PWD/src:$output_dir/packages${PYTHONPATH:+:$PYTHONPATH}
    export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$output_dir/datasets_cache
    if [[ $device == cpu ]]; then
        export CUDA_VISIBLE_DEVICES='' ACCELERATE_USE_CPU=true
    else
        "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
            fail "PyTorch finds no GPU: --device cpu --tiny tries this out without one."
    fi

    mkdir -p "$output_dir" || exit
    settings="--device $device$($tiny && echo ' --tiny')"
    [[ -e $output_dir/settings ]] || echo "$settings" > "$output_dir/settings"
    [[ $(< "$output_dir/settings") == "$settings" ]] ||
        fail "$output_dir holds results of $(< "$output_dir/settings"): choose another --output_dir for $settings."
    if [[ -n $wheels && ! -d $output_dir/packages ]]; then
        "$python" -m pip install --quiet --no-index --no-deps --target "$output_dir/packages" "$wheels"/*.whl || exit
    fi

    # An interrupted piece has neither finished nor failed.
    child=
    trap '[[ -z $child ]] || kill "$child" && wait "$child"; exit 130' INT TERM
    num_failed=0
    for name in "${chosen[@]}"; do
        if [[ -e $output_dir/$name.done ]]; then
            echo "$name: finished before"
            continue
        fi
        rm -f "$output_dir/$name.failed"
        started=$SECONDS
        if run_piece &> "$output_dir/$name.log"; then
            echo "$((SECONDS - started)) s" > "$output_dir/$name.done"
            echo "$name: done in $(< "$output_dir/$name.done")"
        else
            code=$?
            echo "exit code $code$( ((code == 124)) && echo ", its $PIECE_SECONDS s are over")" > "$output_dir/$name.failed"
            echo "$name: failed, $(< "$output_dir/$name.failed"); the end of $output_dir/$name.log:"
            tail -n 5 "$output_dir/$name.log"
            num_failed=$((num_failed + 1))
        fi
    done

    {
        echo "# $settings"
        for name in "${PIECES[@]}"; do
            state='not run'
            [[ -e $output_dir/$name.failed ]] && state="failed, $(< "$output_dir/$name.failed")"
            [[ -e $output_dir/$name.done ]] && state="done in $(< "$output_dir/$name.done")"
            echo "- $name: $state"
        done
        for file in "$output_dir"/*.json; do
            [[ -e ${file%.json}.md ]] && printf '\n## %s\n\n' "$(basename "${file%.json}")" && cat "${file%.json}.md"
        done
    } > "$output_dir/summary.md"
    echo "All results are in $output_dir/summary.md."
    exit $((num_failed > 0))
}
main
