#!/usr/bin/env bash
# bash scripts/wnli.sh METHOD [FLAGS...]: fine-tunes on WNLI, 635 training rows. Environment, sources: see launch.sh.
#
# No paper here has a row for WNLI. LoRA and AdaLoRA use the values for RTE, GLUE's most similar task, with numbers of steps
# in proportion to WNLI's size.
# shellcheck disable=SC2034 # batch and flags are read by launch.sh
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# LoRA, AdaLoRA and RM-LoRA share these values of AdaLoRA for RTE, because no source states any for WNLI.
shared=(
    --learning_rate 1.2e-3 # not stated: RTE's of AdaLoRA Table 8
    --num_train_epochs 50  # not stated: RTE's of AdaLoRA Table 8
    --warmup_steps 50      # not stated: RTE's of AdaLoRA's script, in proportion to the steps
    --max_seq_length 320   # not stated: RTE's of AdaLoRA's script
    --cls_dropout 0.2      # not stated: RTE's of AdaLoRA's script
    --weight_decay 0.01    # not stated: RTE's of AdaLoRA's script
)

settings() { # METHOD
    batch=32 # not stated: RTE's of AdaLoRA Table 8, RM-LoRA's README for MRPC, SoRA's RTE script
    case "$1" in
    lora) flags=(
        --lora_r 8      # not stated: RTE's of AdaLoRA Table 1, row LoRA r=8
        --lora_alpha 32 # not stated: RTE's of AdaLoRA's script
        "${shared[@]}") ;;
    lora-orth) flags=(
        --lora_r 8          # not stated: as lora above
        --lora_alpha 32     # not stated: RTE's of AdaLoRA's script
        --reg_orth_coef 0.3 # not stated: AdaLoRA's gamma, RTE's of Table 8
        "${shared[@]}") ;;
    adalora) flags=(
        --lora_r 12               # not stated: AdaLoRA Table 1, 1.27M: 1.5 x the target
        --target_rank 8           # not stated: AdaLoRA Table 1, 1.27M
        --lora_alpha 32           # not stated: RTE's of AdaLoRA's script (whose initial rank is smaller)
        --reg_orth_coef 0.3       # not stated: RTE's of AdaLoRA Table 8, gamma
        --init_warmup 150         # not stated: RTE's of AdaLoRA Table 8, t_i, in proportion to the steps
        --final_warmup 450        # not stated: RTE's of AdaLoRA Table 8, t_f, in proportion to the steps
        --mask_interval 1         # not stated: RTE's of AdaLoRA Table 8, Delta_T
        --beta1 0.85 --beta2 0.85 # AdaLoRA Table 8
        "${shared[@]}") ;;
    sora) flags=(
        --lora_r 8             # not stated: SoRA's STS-B script
        --lora_alpha 16        # not stated: SoRA's STS-B script
        --sparse_lambda 1e-3   # not stated: SoRA's RTE script
        --sparse_lambda_2 3e-4 # not stated: SoRA's STS-B script
        --learning_rate 1.2e-3 # not stated: SoRA's RTE script
        --num_train_epochs 50  # not stated: SoRA's RTE script
        --max_seq_length 320   # not stated: RTE's of AdaLoRA's script
        --warmup_ratio 0.06    # SoRA's scripts
        --weight_decay 0.1     # SoRA's scripts
        --max_grad_norm 0.1    # SoRA's scripts
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
        --max_seq_length 320  # not stated: RTE's of AdaLoRA's script
        --cls_dropout 0.2     # not stated: RTE's of AdaLoRA's script
        --weight_decay 0.01   # not stated: usual for BERT-like models
        ) ;;
    lora-sora-baseline) die "SoRA's authors state no settings of LoRA for WNLI: use lora, whose values are those of RTE." ;;
    esac
}

launch "$@"
