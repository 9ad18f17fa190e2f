"""Files of DeepSpeed's to read, and ways to change them."""

import copy

SPARSE = "compression_training/sparse_pruning"
WEIGHTS = "compression_training/weight_quantization"
ACTIVATIONS = "compression_training/activation_quantization"
SHARED = f"{WEIGHTS}/shared_parameters"

# Of the shape of the XTC example: binary weights and embeddings, 8-bit activations, five layers.
XTC = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 16,
    "steps_per_print": 200,
    "fp16": {"enabled": True},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.01, "betas": [1, 2]}},
    "compression_training": {
        "layer_reduction": {
            "enabled": True,
            "keep_number_layer": 5,
            "module_name_prefix": "bert.encoder.layer",
            "teacher_layer": [2, 4, 6, 8, 10],
            "other_module_name": ["bert.pooler"],
        },
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantizer_kernel": False,
                "schedule_offset": 0,
                "quantize_groups": 64,
                "quantize_verbose": False,
                "quantization_type": "symmetric",
                "quantize_weight_in_forward": False,
                "rounding": "nearest",
                "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.1},
            },
            "different_groups": {
                "wq1": {
                    "params": {"start_bits": 1, "target_bits": 1, "quantization_period": 0},
                    "modules": ["attention.self", "word_embeddings"],
                }
            },
        },
        "activation_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantization_type": "symmetric",
                "range_calibration": "dynamic",
                "schedule_offset": 0,
            },
            "different_groups": {"aq1": {"params": {"bits": 8}, "modules": ["attention.self"]}},
        },
        "head_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {}},
    },
}

MOQ = {
    "quantize_training": {
        "enabled": True,
        "quantize_verbose": True,
        "quantizer_kernel": True,
        "quantize_type": "symmetric",
        "quantize_bits": {"start_bits": 12, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 10, "schedule_offset": 0},
        "quantize_groups": 8,
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.01},
        "eigenvalue": {
            "enabled": True,
            "max_iter": 50,
            "layer_name": "bert.encoder.layer",
            "layer_num": 12,
        },
    }
}


def changed(tree, path, value):
    """A copy of a file with another value at a path of keys."""
    tree = copy.deepcopy(tree)
    *way, last = path.split("/")
    at = tree
    for key in way:
        at = at[key]
    at[last] = value
    return tree
