"""Hints for unknown names, such as those of other programs, and for settings that a study governs."""

from __future__ import annotations

from collections.abc import Sequence

from .choices import groups
from .errors import any_of, nearest

STUDY_DECIDES = {  # setting of a run that a study chooses by itself -> setting of the study that governs it
    "optimizer.lr": "lr_sweep.grids",
    "optimizer.name": "optimizer=NAME or lr_sweep.optimizers",
    "budget.target_kl": "calibrate.multiples",
    "budget.name": "budget=NAME or calibrate.budgets",
    "budget.schedule": "study.kl_schedule",
    "lr_schedule": "study.lr_schedule and lr_sweep.control_shapes",
    "lr_schedule.name": "study.lr_schedule and lr_sweep.control_shapes",
    "lr_schedule.warmup_steps": "lr_sweep.control_warmups",
    "lr_schedule.warmup_share": "lr_sweep.control_warmups",
    "lr_schedule.decay_share": "the stages",
    "projection.name": "projection=NAME or lr_sweep.projections",
    "stabilizer.name": "the stages",
    "stabilizer.strength": "the arms of a suite",
    "stabilizer.schedule": "the arms of a suite",
    "stabilizer.per": "the arms of a suite",
    "stabilizer.norm": "the arms of a suite",
    "seed": "seeds and study.stage_seed",
    "steps": "lr_sweep.steps, calibrate.steps, lr_scale.steps and finals.steps",
    "train_tokens": "finals.steps or finals.train_tokens, and those of its other stages",
    "evaluate": "the stages: val decides, test judges",
}

MEANT = {  # setting -> its names in other programs, and those that people guess
    "optimizer": ("optim", "opt", "algorithm"),
    "optimizer.lr": ("lr", "learning_rate", "max_lr", "peak_lr"),
    "optimizer.weight_decay": ("wd", "weight_decay", "decay", "l2"),
    "optimizer.beta1": ("betas", "adam_beta1"),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("epsilon", "adam_eps", "adam_epsilon"),
    "optimizer.momentum": ("mu", "nesterov"),
    "model.blocks": ("depth", "n_layer", "n_layers", "num_layers", "layers", "num_hidden_layers"),
    "model.heads": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
    "model.width": ("n_embd", "hidden", "hidden_size", "hidden_dim", "d_model", "dim", "embed_dim"),
    "model.context": ("block_size", "seq_len", "seq_length", "context_length", "max_length", "ctx"),
    "model.dropout": ("p_drop", "drop", "dropout_rate"),
    "batch_size": ("bs", "batch", "batchsize", "train_batch_size", "micro_batch_size"),
    "steps": ("epochs", "max_steps", "iters", "max_iters", "num_steps", "n_steps", "train_steps"),
    "train_tokens": ("max_tokens", "num_tokens", "n_tokens", "token_budget", "total_tokens"),
    "seed": ("random_seed", "rng"),
    "seeds": ("n_seeds", "num_seeds"),
    "lr_schedule": ("schedule", "scheduler", "lr_scheduler", "lr_decay"),
    "lr_schedule.warmup_steps": ("warmup", "warmup_iters", "num_warmup_steps"),
    "lr_schedule.warmup_share": ("warmup_ratio", "warmup_frac", "warmup_fraction"),
    "stabilizer": ("clip", "clipping", "clipper", "method"),
    "stabilizer.strength": ("max_norm", "max_grad_norm", "grad_clip", "clip_norm", "threshold"),
    "budget.target_kl": ("kl", "delta", "delta_star", "kl_target", "max_kl", "desired_kl"),
    "quantizer": ("quantize", "quantization", "bits", "levels", "bitnet"),
    "quantizer.gradients": ("quantize_gradients", "gradient_compression"),
    "quantizer.state": ("state_bits", "optimizer_state"),
    "quantizer.error_feedback": ("feedback", "residual"),
    "ebm.n": ("latent_dim",),
    "ebm.splats": ("max_splats", "n_splats", "num_splats"),
    "ebm.neighbours": ("knn_k", "n_neighbors"),
    "ebm.window": ("context_local_window", "context_local"),
    "ebm.levels": ("noise_levels", "sigmas"),
    "ebm.kappa_min": ("min_kappa",),
    "ebm.kappa_max": ("max_kappa",),
    "ebm.soc_every": ("soc_check_interval",),
    "decoder.experts": ("moe_experts", "n_experts", "num_experts"),
    "decoder.active": ("moe_active", "experts_per_token", "num_experts_per_tok"),
    "sampler.steps": ("langevin_steps",),
    "sampler.step": ("langevin_dt",),
    "sampler.friction": ("langevin_gamma",),
    "sampler.temperature": ("langevin_t",),
    "dtype": ("amp", "precision", "mixed_precision", "autocast", "bf16", "fp16", "torch_dtype"),
    "device": ("device_type", "accelerator", "cuda", "gpu"),
    "compile": ("torch_compile", "jit"),
    "threads_per_run": ("threads", "num_threads", "n_threads", "omp_num_threads"),
    "eval_every": ("eval_interval", "eval_steps", "val_every", "val_check_interval"),
    "eval_windows": ("eval_iters", "eval_batches"),
    "data": ("dataset", "corpus", "text"),
    "data.file": ("data_file", "train_file", "data_path", "data_dir"),
    "launcher.slots": ("gpus", "workers", "num_workers", "n_jobs", "jobs", "parallel", "devices"),
    "launcher.processes_per_run": ("nproc_per_node", "nproc", "num_processes", "world_size", "ddp"),
    "launcher.checkpoint_every_s": ("save_every", "save_steps", "checkpoint_every", "checkpoint_interval"),
    "launcher.mem_gb": ("mem", "ram"),
    "launcher.timeout_min": ("time", "walltime", "timeout", "time_limit"),
    "tracker": ("logger", "wandb", "tensorboard", "mlflow", "trackio", "report_to"),
    "study.name": ("name", "run_name", "exp_name", "experiment", "experiment_name", "project"),
    "study.stages": ("stages", "stage"),
    "output_dir": ("out", "outdir", "out_dir", "output", "output_path", "save_dir", "logdir"),
    "scale": ("size", "preset", "profile"),
}
SETTING_MEANT = {name: setting for setting, names in MEANT.items() for name in names}

# group or setting -> choice -> its names in other programs
MEANT_CHOICE: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "adamw": ("adam_w", "AdamW"),
        "sgd": ("momentum", "SGD", "nesterov"),
        "soap": ("shampoo",),
        "schedule_free": ("schedulefree", "sf_adamw", "adamw_sf"),
    },
    "lr_schedule": {
        "trapezoid": ("wsd", "warmup_stable_decay", "linear_decay"),
        "warmup_linear": ("linear", "linear_warmup"),
        "inverse_sqrt": ("rsqrt", "noam"),
        "constant": ("none", "fixed"),
        "cosine": ("cos", "cosine_annealing", "cosine_with_warmup"),
    },
    "stabilizer": {
        "norm_clip": ("clip", "clip_grad_norm", "grad_clip", "gradient_clipping"),
        "value_clip": ("clip_grad_value",),
    },
    "dtype": {"bfloat16": ("bf16", "float16", "fp16", "half", "amp"), "float32": ("fp32", "float", "full")},
    "device": {"cuda": ("gpu", "cuda:0", "rocm", "hip")},
    "launcher": {
        "slurm": ("submitit", "cluster"),
        "inline": ("debug", "serial"),
        "local": ("process", "multiprocessing"),
    },
    "scale": {
        "smoke": ("tiny", "test", "debug"),
        "paper": ("full", "large", "big", "gpu"),
        "laptop": ("small", "cpu"),
    },
    "data": {"shakespeare": ("tinyshakespeare", "tiny_shakespeare"), "path": ("file", "custom")},
    "tracker": {"tensorboard": ("tb",), "wandb": ("wb", "weights_and_biases")},
    "quantizer": {"ternary": ("bitnet", "b158", "1.58", "three"), "five": ("quinary", "2.32", "5")},
}

OWN_CHOICES = (
    "choices of your own are files in conf/GROUP/ of the folder you work in, launcher=mine for "
    "conf/launcher/mine.yaml, or named by their path, launcher=./FOLDER/mine.yaml"
)
IMPOSSIBLE = {  # (setting, choice that people ask for) -> why it cannot be had
    ("device", "vulkan"): "torch's Vulkan backend only infers and is in no released wheel; on an AMD card "
    "torch's ROCm build trains with device=cuda",
}


def near_setting(key: str, known: Sequence[str]) -> str:
    """Return a hint ` (did you mean …?)` for an unknown setting, or an empty string if no setting is similar.
    If a study decides the setting meant, the hint also names the study's own setting."""
    tail = key.rpartition(".")[2]
    taken = {name.rpartition(".")[2] for name in known}
    setting = SETTING_MEANT.get(key) or (None if tail in taken else SETTING_MEANT.get(tail))
    if setting is None:
        return nearest(key, known)
    governor = STUDY_DECIDES.get(setting)
    return f" (did you mean {setting}{f' for a run, {governor} for a study' if governor else ''}?)"


def near_choice(key: str, word: str, known: Sequence[str]) -> str:
    """Return a hint ` (did you mean …?)` for an unknown choice of a group or setting, the reason if that
    choice is impossible, or an empty string if no choice is similar."""
    if why := IMPOSSIBLE.get((key, word)):
        return f" ({why})"
    for choice, names in MEANT_CHOICE.get(key, {}).items():
        if word in names and choice in known:
            return f" (did you mean {choice}?)"
    named = {group: choices for group, choices in groups().items() if group != "ebm"}  # it follows scale
    elsewhere = [f"{group}={word}" for group, choices in named.items() if word in choices]
    return nearest(word, known) or (f" (did you mean {any_of(elsewhere)}?)" if elsewhere else "")
