"""Flags that transformers has dropped and scripts still have, and what to give in their place."""

_AUTOCAST = "leave it out, --fp16 and --bf16 always use PyTorch's autocast"
_EFFECT = "leave it out, it has no effect any more"
_TPU = "leave it out, this program does not run on TPUs"
_FSDP = "leave it out, FSDP is not supported here"

GONE = {
    "adafactor": "give --optim adafactor",
    "data_dir": "give --dataset_name FOLDER",
    "dispatch_batches": """give --accelerator_config '{"dispatch_batches": true}'""",
    "do_lower_case": "leave it out, the tokenizer's own files decide",
    "evaluate_during_training": "give --eval_strategy steps",
    "fp16_backend": _AUTOCAST,
    "fp16_opt_level": _AUTOCAST,
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "half_precision_backend": _AUTOCAST,
    "include_inputs_for_metrics": "leave it out, the metrics of this program need no inputs",
    "include_tokens_per_second": "give --include_num_input_tokens_seen True",
    "jit_mode_eval": "leave it out, or give --torch_compile",
    "max_length": "give --max_seq_length",
    "max_test_samples": "give --max_predict_samples",
    "max_val_samples": "give --max_eval_samples",
    "model_type": "leave it out, the model's own config names it",
    "mp_parameters": "leave it out, model parallelism of SageMaker is not supported here",
    "past_index": _EFFECT,
    "per_gpu_eval_batch_size": "give --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "give --per_device_train_batch_size",
    "push_to_hub_model_id": "give --hub_model_id",
    "push_to_hub_organization": "give --hub_model_id ORGANIZATION/NAME",
    "push_to_hub_token": "give --hub_token, or log in with 'hf auth login'",
    "ray_scope": "leave it out, only the search for hyperparameters used it",
    "save_safetensors": "leave it out, weights are always saved as safetensors",
    "sharded_ddp": _FSDP,
    "split_batches": """give --accelerator_config '{"split_batches": true}'""",
    "torchdynamo": "give --torch_compile_backend",
    "tp_size": "leave it out, tensor parallelism is not supported here",
    "tpu_metrics_debug": _TPU,
    "tpu_name": _TPU,
    "tpu_num_cores": _TPU,
    "use_auth_token": "give --token, or log in with 'hf auth login'",
    "use_ipex": "leave it out, PyTorch itself has the kernels for Intel's processors",
    "use_legacy_prediction_loop": _EFFECT,
    "use_mps_device": "leave it out, an Apple GPU is used where there is one unless --use_cpu is given",
    "xpu_backend": "give --ddp_backend",
}
