# Sourced by the task scripts (cola.sh, mnli.sh, ...). They hold the settings of each method; this file holds the rest.
#
#   bash scripts/TASK.sh METHOD [FLAGS...]
#
# METHOD: lora, lora-orth, adalora, sora, rm-lora-v1, rm-lora-v2 or full; `all` runs these one after the other.
# lora-sora-baseline is LoRA with the settings of SoRA's authors. METHOD may also be the path of your own entry point, which
# gets the data, seed, batch and folder below, and FLAGS. If `--like METHOD` stands first among FLAGS, it also gets
# --apply_lora and the task's settings of that method.
# FLAGS override the settings of the script. These variables of the environment are read:
#   MODEL   folder or hub name of the model (default microsoft/deberta-v3-base)
#   DATA    folder with the task's data, or with a folder for each task; without it the data come from the hub
#   OUTPUT  base folder (default output/ in the clone); the run is in OUTPUT/TASK/METHOD/seedSEED
#   SEED    default 42
#   PYTHON  interpreter; by default that of the active environment if the project is installed there, else of .venv
#   CUDA_VISIBLE_DEVICES  the GPUs to use, with one process for each (NPROC: another number of processes)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT  for several machines, as in torchrun
#   DRY_RUN=1  print the command and stop
#
# Sources of the settings: AdaLoRA is arXiv 2303.10512 (Tables 1 and 8) and its original script. SoRA is arXiv 2311.11696 and
# its scripts. RM-LoRA is arXiv 2407.12074, whose released README and script state settings only for MRPC. "not stated" means
# that the source of the method gives no value for this task; the text after it names where we took the value from.
#
# If the same command is given again, the run goes on from its last checkpoint; a finished run is left alone.
# shellcheck shell=bash
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" # root, die, setup_env

here="$PWD"
task="$(basename "${BASH_SOURCE[1]}" .sh)"
methods=(lora lora-orth adalora sora rm-lora-v1 rm-lora-v2 full)
known=("${methods[@]}" lora-sora-baseline) # a second setting of a method, which `all` leaves out

# The entry point of each method, and the flags that name the method there.
declare -A entries=([lora]=AdaLoRA [lora-orth]=AdaLoRA [adalora]=AdaLoRA [sora]=SoRA [rm-lora-v1]=RM-LoRA
    [rm-lora-v2]=RM-LoRA [full]=AdaLoRA [lora-sora-baseline]=AdaLoRA)
declare -A named=([lora]="--apply_lora --lora_type frd" [lora-orth]="--apply_lora --lora_type frd"
    [lora-sora-baseline]="--apply_lora --lora_type frd"
    [adalora]="--apply_lora --lora_type svd --apply_adalora" [sora]="--apply_lora --train_sparse"
    [rm-lora-v1]="--apply_lora --lora_type v1" [rm-lora-v2]="--apply_lora --lora_type v2" [full]="")

# Flags of every method of every task: an evaluation in each epoch, and a checkpoint at every 500th step, from which an
# interrupted run goes on.
common=(--do_train --do_eval --eval_strategy epoch --logging_steps 50 --report_to tensorboard
    --save_strategy steps --save_steps 500 --save_total_limit 2
    --lora_module "query,key,value,intermediate,layer.output,attention.output") # AdaLoRA section 4: all of a layer

# lora-sora-baseline, LoRA as SoRA's authors trained it: issue 4 of their repository; seeds 0, 21, 42, 81, 100. These values
# are the same for all tasks.
# shellcheck disable=SC2034 # the task scripts read it
sora_authors=(
    --lora_r 8          # SoRA's Table 1, row LoRA r=8
    --lora_alpha 16     # SoRA's config/lora_config.json
    --warmup_ratio 0.06 # SoRA's script for LoRA
    --weight_decay 0.1  # SoRA's script for LoRA
    --max_grad_norm 0.1 # SoRA's script for LoRA
)

# value_of NAME DEFAULT FLAGS...: the value of the last --NAME among FLAGS (True without a value), otherwise DEFAULT. As in
# the entry points, dashes count as underscores and names may be abbreviated. Ambiguous names are refused there.
value_of() {
    local name="$1" value="$2" word
    shift 2
    while (($#)); do
        word="${1%%=*}"
        word="${word#--}"
        word="${word//-/_}"
        if [[ "$1" == --* && ${#word} -ge 2 && "$name" == "$word"* ]]; then
            if [[ "$1" == *=* ]]; then
                value="${1#*=}"
            elif [[ $# -gt 1 && "$2" != --* ]]; then
                value="$2"
            else
                value=True
            fi
        fi
        shift
    done
    echo "$value"
}

# is_on VALUE: whether the entry points read the value of a switch as yes.
is_on() {
    [[ "$1" =~ ^([Tt][Rr][Uu][Ee]|[Tt]|[Yy][Ee][Ss]|[Yy]|[Oo][Nn]|1)$ ]]
}

# shown WORDS...: the words as one could type them, access tokens hidden as loralib/secrets.py does.
shown() {
    local word name hidden=""
    for word in "$@"; do
        name="${word%%=*}"
        name="${name//-/_}"
        if [[ -n "$hidden" && "$word" != --* ]]; then
            word=...
            hidden=""
        elif [[ "$name" =~ ^__(.*token|toke?|hub_to?k?e?|push_to_hub_t?o?k?e?)$ ]]; then
            hidden=1
            [[ "$word" != *=* ]] || { word="${word%%=*}=..." && hidden=""; }
        else
            hidden=""
        fi
        [[ ! "$word" =~ hf_[A-Za-z0-9]{30,} ]] || word="${word//"${BASH_REMATCH[0]}"/...}"
        printf '%q ' "$word"
    done
    echo
}

# Prints the number of visible GPUs, or 0 if --use_cpu is among the flags.
gpus() {
    local -a ids=()
    if is_on "$(value_of use_cpu "$(value_of no_cuda False "$@")" "$@")"; then
        :
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        IFS=, read -ra ids <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t ids < <(nvidia-smi -L 2>/dev/null | grep '^GPU ' || true)
    fi
    echo "${#ids[@]}"
}

# finished FOLDER: whether it holds the results of a finished run. A run.json is written whole or not at all. If anything
# else has cut it short, it does not count.
finished() {
    tail -n 1 "$1/run.json" 2>/dev/null | grep -q '^}' && grep -q '^  "status": "finished"' "$1/run.json"
}

run() { # METHOD FLAGS...
    local method="$1" label="$1" visible processes nodes="${NNODES:-1}" count accumulate output overwrite per_device
    local entry batch=32 like
    local -a flags=() own=() launcher=()
    shift
    if [[ -f "$here/$method" || ("$method" == /* && -f "$method") ]]; then # the user's own entry point
        entry="$method"
        [[ "$method" == /* ]] || entry="$here/$method"
        label="$(basename "$method" .py)"
        [[ "$label" != run_glue ]] || label="$(basename "$(dirname "$entry")")"
        if [[ "${1:-}" == --like ]]; then
            like="${2:-}"
            [[ " ${known[*]} " == *" $like "* ]] || die "--like '$like' is not a method: use one of ${known[*]}."
            shift 2
            settings "$like"
            [[ "$like" == full ]] || flags=(--apply_lora "${flags[@]}")
        else
            common=(--do_train --do_eval)
        fi
    else
        [[ " ${known[*]} " == *" $method "* ]] ||
            die "'$method' is not a method of scripts/$task.sh: use one of ${known[*]}, all, or the path of an entry point."
        settings "$method"
        # shellcheck disable=SC2206 # words
        flags=(${named[$method]} "${flags[@]}")
        entry="$root/${entries[$method]}/run_glue.py"
    fi

    visible="$(gpus "$@")"
    count="${NPROC:-$((visible > 0 ? visible : 1))}"
    [[ "$count" =~ ^[1-9][0-9]*$ ]] || die "NPROC is '$count', it must be a number of processes, 1 or more."
    processes="$((count * nodes))"
    accumulate="$(value_of gradient_accumulation_steps 1 "$@")"
    if [[ -z "$(value_of per_device_train_batch_size "" "$@")" ]]; then
        # The effective batch stays that of the source, so that settings in steps keep their meaning.
        ((batch % (processes * accumulate) == 0)) ||
            die "$task's $method needs a batch of $batch, which cannot be divided by $processes processes x $accumulate" \
                "accumulated batches. Choose a number of GPUs (CUDA_VISIBLE_DEVICES) or of accumulated batches" \
                "(--gradient_accumulation_steps) that divides it, or set --per_device_train_batch_size, which changes the" \
                "number of steps."
        per_device="$((batch / processes / accumulate))"
        own+=(--per_device_train_batch_size "$per_device")
    fi

    output="$(value_of output_dir "${OUTPUT:-$root/output}/$task/$label/seed${SEED:-42}" "$@")"
    own+=(--model_name_or_path "${MODEL:-microsoft/deberta-v3-base}" --task_name "$task"
        --seed "${SEED:-42}" --output_dir "$output")
    [[ -z "${DATA:-}" ]] || own+=(--dataset_name "$DATA")
    overwrite="$(value_of overwrite_output_dir False "$@")"

    if ((processes > 1)); then
        ((visible > 0)) || own+=(--use_cpu) # otherwise each process would train alone
        launcher=(-m torch.distributed.run --nproc_per_node "$count")
        if ((nodes > 1)); then
            [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
                die "NNODES is $nodes: set NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR (the first machine) too."
            launcher+=(--nnodes "$nodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
                --master_port "${MASTER_PORT:-29500}")
        else
            launcher+=(--standalone)
        fi
    fi

    # For any other folder the entry point decides whether the run goes on, starts from scratch or is refused.
    if ! is_on "$overwrite" && finished "$output"; then
        echo "$output holds a finished run, so nothing is done, even if other flags are given. --overwrite_output_dir starts over."
        return
    fi

    # Later flags win: those of the command line come last.
    local -a call=(${launcher[@]+"${launcher[@]}"} "$entry" "${common[@]}" ${flags[@]+"${flags[@]}"} "${own[@]}" "$@")
    if [[ "${DRY_RUN:-0}" != 0 ]]; then
        shown "${PYTHON:-python}" "${call[@]}"
        return
    fi
    if [[ -n "${PYTHON:-}" ]]; then
        python="$PYTHON"
    else
        setup_env .venv "" constraints.txt
    fi
    exec "$python" "${call[@]}" # exec, so that signals reach the run itself
}

launch() {
    local method
    case "${1:-}" in
    "" | -h | --help)
        sed -n '2,/^# shellcheck/{s/^# \{0,1\}//;/^shellcheck/!p;}' "${BASH_SOURCE[0]}" | sed "s/TASK.sh/$task.sh/"
        [[ -n "${1:-}" ]] || exit 2
        ;;
    all)
        shift
        for method in "${methods[@]}"; do
            (run "$method" "$@")
        done
        ;;
    *) run "$@" ;;
    esac
}
