#!/usr/bin/env bash
# bash scripts/quickstart.sh [FLAGS]: fine-tunes with LoRA, AdaLoRA, SoRA, RM-LoRA v1 and v2, and prints one table.
#
# Without flags it trains the embedded tiny DeBERTa-v3 on generated pairs in MRPC's format, without network, in about a
# minute on two cores. Flags go to the entry points. A flag for the model or the data replaces the embedded one:
#   bash scripts/quickstart.sh --model_name_or_path microsoft/deberta-v3-base --task_name mrpc
# --output_dir DIR gets a folder for each method (default output/quickstart, or output/MODEL-DATA for other models or data).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

own_model="" own_data="" base="" flags=()
while (($#)); do
    flag="${1%%=*}" given=("$1")
    if [[ "$1" == *=* ]]; then
        value="${1#*=}"
    else
        value="${2:-}"
    fi
    case "$flag" in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "${BASH_SOURCE[0]}"
        exit
        ;;
    --output_dir | --model_name_or_path | --config_name | --task_name | --dataset_name | --train_file | --validation_file)
        [[ -n "$value" ]] || die "$flag needs a value after it."
        [[ "$1" == *=* ]] || { given+=("$2") && shift; }
        case "$flag" in
        --output_dir) base="$value" given=() ;;
        --model_name_or_path | --config_name) own_model="$value" ;;
        *) own_data="$value" ;;
        esac
        ;;
    esac
    flags+=(${given[@]+"${given[@]}"})
    shift
done

setup_env .venv "" constraints.txt

common=(--do_train --do_eval --lora_module query,key,value,intermediate,layer.output,attention.output
    --per_device_train_batch_size 32 --evaluation_strategy epoch --logging_steps 10
    --report_to tensorboard)
if [[ -z "$own_model" || -z "$own_data" ]]; then
    embedded="$("$python" "$root/scripts/embedded.py")" || die "building the embedded model and data failed, see above."
    [[ -n "$own_model" ]] || common+=(--model_name_or_path "$embedded/deberta-v3-tiny")
    [[ -n "$own_data" ]] || common+=(--dataset_name "$embedded/mrpc")
fi
if [[ -z "$own_model$own_data" ]]; then
    base="${base:-$root/output/quickstart}"
    # A tiny model and few rows need a larger learning rate than the paper's, more epochs, a lower threshold, and phases of
    # AdaLoRA that fit into epochs of 32 steps. The files of an earlier quickstart are replaced.
    common+=(--learning_rate 5e-3 --num_train_epochs 8 --max_seq_length 40 --overwrite_output_dir)
    sparse_lambda_2=0.002 warmup=10
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # with tensors this small, threads only wait for each other
else
    # These are the settings of the paper's commands. An interrupted run goes on from its last checkpoint.
    base="${base:-$root/output/$(basename "${own_model:-deberta-v3-tiny}")-$(basename "${own_data:-embedded}")}"
    common+=(--learning_rate 1e-3 --num_train_epochs 5 --max_seq_length 128)
    sparse_lambda_2=0.005 warmup=50
fi

run() { # METHOD ENTRY_POINT FLAGS...
    local method="$1" entry="$2"
    shift 2
    echo
    echo "== $method: $entry $*"
    "$python" "$root/$entry" --apply_lora "$@" "${common[@]}" --output_dir "$base/$method" ${flags[@]+"${flags[@]}"} ||
        die "$method failed, see the message above; nothing after it was run."
}
run lora AdaLoRA/run_glue.py --lora_type frd --lora_r 16 --lora_alpha 32 --reg_orth_coef 0
run adalora AdaLoRA/run_glue.py --apply_adalora --lora_type svd --lora_r 16 --lora_alpha 32 --target_rank 8 \
    --reg_orth_coef 0.1 --init_warmup "$warmup" --final_warmup "$warmup" --mask_interval 10 --beta1 0.85 --beta2 0.85
run sora SoRA/run_glue.py --train_sparse True --lora_r 16 --lora_alpha 32 --sparse_lambda 0.0 \
    --sparse_lambda_2 "$sparse_lambda_2"
run rm-lora-v1 RM-LoRA/run_glue.py --lora_type v1 --lora_r 4 --random_rank 2 --lora_alpha 16 --reg_orth_coef 0.1
run rm-lora-v2 RM-LoRA/run_glue.py --lora_type v2 --lora_r 8 --random_rank 4 --lora_alpha 32 --reg_orth_coef 0.1

echo
"$python" "$root/scripts/quickstart_table.py" "$base"/{lora,adalora,sora,rm-lora-v1,rm-lora-v2} ||
    die "the runs are in $base, but their table could not be made, see above."
echo "The runs are in $base; curves: tensorboard --logdir $base"
