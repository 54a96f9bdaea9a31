#!/usr/bin/env bash
# bash scripts/rte.sh METHOD [FLAGS...]: fine-tunes on RTE, 2,490 training rows. Environment, sources: see launch.sh.
# shellcheck disable=SC2034 # batch and flags are read by launch.sh
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# LoRA, AdaLoRA and RM-LoRA share these values of AdaLoRA, because the sources of the others state none for this task.
shared=(
    --learning_rate 1.2e-3 # AdaLoRA Table 8
    --num_train_epochs 50  # AdaLoRA Table 8
    --warmup_steps 200     # AdaLoRA's script
    --max_seq_length 320   # AdaLoRA's script
    --cls_dropout 0.2      # AdaLoRA's script
    --weight_decay 0.01    # AdaLoRA's script
)

settings() { # METHOD
    batch=32 # AdaLoRA Table 8, RM-LoRA's README for MRPC, SoRA's RTE script; LoRA and full: not stated
    case "$1" in
    lora) flags=(
        --lora_r 8      # AdaLoRA Table 1, row LoRA r=8
        --lora_alpha 32 # not stated: AdaLoRA's script
        "${shared[@]}") ;;
    lora-orth) flags=(
        --lora_r 8          # not stated: as lora above
        --lora_alpha 32     # not stated: AdaLoRA's script
        --reg_orth_coef 0.3 # not stated: AdaLoRA's gamma, Table 8
        "${shared[@]}") ;;
    adalora) flags=(
        --lora_r 12               # AdaLoRA Table 1, 1.27M: 1.5 x the target
        --target_rank 8           # AdaLoRA Table 1, 1.27M
        --lora_alpha 32           # AdaLoRA's script (whose initial rank is smaller)
        --reg_orth_coef 0.3       # AdaLoRA Table 8, gamma
        --init_warmup 600         # AdaLoRA Table 8, t_i
        --final_warmup 1800       # AdaLoRA Table 8, t_f
        --mask_interval 1         # AdaLoRA Table 8, Delta_T
        --beta1 0.85 --beta2 0.85 # AdaLoRA Table 8
        "${shared[@]}") ;;
    sora) flags=(
        --lora_r 8               # SoRA's STS-B script (RTE's not known)
        --lora_alpha 16          # SoRA's STS-B script (RTE's not known)
        --sparse_lambda 1e-3     # SoRA's RTE script
        --sparse_lambda_2 0      # SoRA's RTE script: the schedule starts at 0 ...
        --max_lambda 7e-4        # SoRA's RTE script: ... and ends here,
        --lambda_num 7           # SoRA's RTE script: in 7 stages
        --lambda_schedule linear # not stated: evenly spaced thresholds
        --lambda_epochs 15       # SoRA's RTE script: of each stage after the first
        --learning_rate 1.2e-3   # SoRA's RTE script
        --num_train_epochs 50    # SoRA's RTE script: of the first stage
        --max_seq_length 320     # SoRA's RTE script
        --warmup_ratio 0.06      # SoRA's scripts
        --weight_decay 0.1       # SoRA's scripts
        --max_grad_norm 0.1      # SoRA's scripts
        ) ;;
    rm-lora-v1) flags=(
        --lora_r 4          # not stated: RM-LoRA's README for MRPC
        --random_rank 2     # not stated: RM-LoRA's README for MRPC
        --lora_alpha 16     # not stated: RM-LoRA's README for MRPC
        --reg_orth_coef 0.1 # not stated: RM-LoRA's README for MRPC
        "${shared[@]}") ;;
    rm-lora-v2) flags=(
        --lora_r 8          # not stated: RM-LoRA's script for MRPC
        --random_rank 4     # not stated: RM-LoRA's script for MRPC
        --lora_alpha 32     # not stated: RM-LoRA's script for MRPC
        --reg_orth_coef 0.1 # not stated: RM-LoRA's README for MRPC
        "${shared[@]}") ;;
    full) flags=(
        --learning_rate 2e-5  # not stated: the model card of deberta-v3-base (MNLI)
        --num_train_epochs 10 # not stated: usual for GLUE's small sets
        --warmup_ratio 0.1    # not stated: usual for BERT-like models
        --max_seq_length 320  # not stated: AdaLoRA's script
        --cls_dropout 0.2     # not stated: AdaLoRA's script
        --weight_decay 0.01   # not stated: usual for BERT-like models
        ) ;;
    lora-sora-baseline) # LoRA as SoRA's authors trained it; launch.sh has what all tasks share
        batch=8 # SoRA's authors
        flags=(
        --learning_rate 1.2e-3 # SoRA's authors
        --num_train_epochs 50  # SoRA's authors
        --max_seq_length 320   # not stated: SoRA's RTE script for SoRA
        "${sora_authors[@]}") ;;
    esac
}

launch "$@"
