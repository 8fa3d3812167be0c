"""Words of other tools, and the help that leads to those of this language."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """Help for a word of another tool, and the line to write if the value can be kept.

    `line` may use `{value}`, the text of the value as the user wrote it, and `{batch}`, the unit of
    the stage's batch.
    """

    help: str
    line: str = ""
    replaces_attribute: bool = False
    """Whether `line` replaces the attribute as it stands (a fix), or is only an example."""


_LR = Foreign(
    "the learning rate is an argument of the optimizer",
    "optimizer = adamw(lr = {value})",
    replaces_attribute=True,
)
_BATCH = Foreign(
    "`batch` is the batch of one step, over all devices; the plan chooses the micro-batch",
    "batch = {value} {batch}",
    replaces_attribute=True,
)
_GROUP = Foreign(
    "the number of completions for each prompt is the `group`",
    "group = {value}",
    replaces_attribute=True,
)
_KL = Foreign(
    "the KL penalty is a term with its coefficient", "kl = k3({value})", replaces_attribute=True
)
_EPOCHS = Foreign(
    "the length of a stage has a unit", "length = {value} epochs", replaces_attribute=True
)
_STEPS = Foreign(
    "the length of a stage has a unit", "length = {value} steps", replaces_attribute=True
)
_MAX_TOKENS = Foreign(
    "the completion length is an argument of the rollout", "rollout = sampling(max_tokens = {value})",
    replaces_attribute=True,
)  # fmt: skip
_LORA = Foreign("LoRA is an adapter of a stage", "adapter = lora(rank = 16, alpha = 32)")
_MODEL = Foreign(
    "a stage starts `from` a model, or from the stage that yields it",
    "from = {value}",
    replaces_attribute=True,
)
_QUANTIZED = Foreign("quantization is an attribute of the model", "weights = nf4")

STAGE: dict[str, Foreign] = {
    "learning_rate": _LR, "lr": _LR, "actor_lr": _LR,
    "weight_decay": Foreign("weight decay is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, weight_decay = {value})"),
    "warmup_ratio": Foreign("the warm-up is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, warmup = 3%)"),
    "warmup_steps": Foreign("the warm-up is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, warmup = {value} steps)"),
    "lr_scheduler_type": Foreign("the schedule is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, decay = cosine)"),
    "max_grad_norm": Foreign("gradient clipping is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, clip_norm = {value})"),
    "gradient_clipping": Foreign("gradient clipping is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, clip_norm = {value})"),
    "num_train_epochs": _EPOCHS, "num_epochs": _EPOCHS, "epochs": _EPOCHS, "n_epochs": _EPOCHS,
    "max_steps": _STEPS, "num_steps": _STEPS, "steps": _STEPS, "num_train_steps": _STEPS,
    "batch_size": _BATCH, "train_batch_size": _BATCH, "global_batch_size": _BATCH,
    "per_device_train_batch_size": Foreign(
        "`batch` is the batch of one step, over all devices; what a device processes at once is"
        " the `micro_batch`, which the plan chooses unless you pin it",
        "micro_batch = {value} sequences",
    ),
    "gradient_accumulation_steps": Foreign(
        "nothing to set: `batch` is the batch of one step, and the plan divides it"
        " into micro-batches that fit"
    ),
    "num_generations": _GROUP, "group_size": _GROUP, "n_samples": _GROUP,
    "beta": _KL, "kl_coef": _KL, "kl_beta": _KL, "kl_coeff": _KL, "init_kl_coef": _KL,
    "epsilon": Foreign("the clip range is a call", "clip = clip(low = {value}, high = {value})", replaces_attribute=True),
    "epsilon_high": Foreign("the clip range is a call", "clip = clip(low = 0.2, high = {value})"),
    "max_new_tokens": _MAX_TOKENS, "max_tokens": _MAX_TOKENS, "max_completion_length": _MAX_TOKENS,
    "max_response_length": _MAX_TOKENS,
    "temperature": Foreign("the temperature is an argument of the rollout", "rollout = sampling(temperature = {value})"),
    "max_length": Foreign("the longest sequence is an attribute of the model", "context = {value}"),
    "max_seq_length": Foreign("the longest sequence is an attribute of the model", "context = {value}"),
    "lora": _LORA, "lora_r": _LORA, "lora_rank": _LORA, "peft_config": _LORA, "use_peft": _LORA,
    "load_in_4bit": _QUANTIZED, "load_in_8bit": _QUANTIZED,
    "model": _MODEL, "model_name_or_path": _MODEL, "base_model": _MODEL, "init_from": _MODEL,
    "dataset": Foreign("a stage trains on its `data`", "data = {value}", replaces_attribute=True),
    "train_dataset": Foreign("a stage trains on its `data`", "data = {value}", replaces_attribute=True),
    "eval_dataset": Foreign("declare an `eval` over the data and list it", "evals = [accuracy]"),
    "reward_funcs": Foreign("one reward expression combines them", "reward = 0.8 * correct + 0.2 * shape"),
    "reward_fn": Foreign("one reward expression combines them", "reward = 0.8 * correct + 0.2 * shape"),
    "optim": Foreign("the optimizer is a call", "optimizer = adamw(lr = 1e-5)"),
    "save_steps": Foreign("checkpoints are written by default; their interval is", "checkpoint_every = {value} steps", replaces_attribute=True),
    "logging_steps": Foreign("metrics are logged by default; their interval is", "log_every = {value} steps", replaces_attribute=True),
    "eval_steps": Foreign("the interval of evaluations is", "eval_every = {value} steps", replaces_attribute=True),
    "bf16": Foreign("the precision is an attribute of the model", "dtype = bf16"),
    "fp16": Foreign("the precision is an attribute of the model", "dtype = bf16"),
    "gradient_checkpointing": Foreign("rematerialisation is", "remat = full"),
    "depends_on": Foreign("stages are ordered by what they use: `from`, `data`, `reward`"),
    "sequence_len": Foreign("the longest sequence is an attribute of the model", "context = {value}"),
    "max_prompt_length": Foreign("the prompt length is an argument of the rollout", "rollout = sampling(max_prompt = {value})"),
    "sample_packing": Foreign("it is called `packing`", "packing = true"),
    "lr_scheduler": Foreign("the schedule is an argument of the optimizer", "optimizer = adamw(lr = 1e-5, decay = cosine)"),
    "lora_alpha": _LORA, "lora_target_modules": _LORA, "lora_dropout": _LORA,
    "val_set_size": Foreign("hold some out and measure it", "data = math.split(test = 5%).train"),
    "train_on_inputs": Foreign("supervised tuning trains on responses alone; to train on every token, use `pretrain`"),
    "dataset_text_field": Foreign("the data says which field is the text", 'text = "{{text}}"'),
    "deepspeed": Foreign("the plan shards by itself; to pin it", "mesh = axes(fsdp = 8)"),
    "fsdp": Foreign("the plan shards by itself; to pin it", "mesh = axes(fsdp = 8)"),
    "report_to": Foreign("trackers are named in the `run` block", "track = [tensorboard()]"),
    "eval_strategy": Foreign("the interval of evaluations is", "eval_every = 100 steps"),
    "loss_type": Foreign("the loss is made of `advantage`, `ratio`, `clip` and `aggregate`; the kinds of stages are its rows"),
    "scale_rewards": Foreign("whether rewards are divided by their deviation", "advantage = group_mean"),
    "num_iterations": Foreign("how often a step's completions are gone through", "passes = {value}", replaces_attribute=True),
    "use_vllm": Foreign("there is nothing to set: training and sampling share one model"),
    "reward_weights": Foreign("one reward expression weighs them", "reward = 0.8 * correct + 0.2 * shape"),
    "output_dir": Foreign("results go to the store; to write a model out, add an `export` stage", "path = {value}"),
}  # fmt: skip
"""Attributes of a stage elsewhere."""

MODEL: dict[str, Foreign] = {
    "name": Foreign("a model is named by its `path`", "path = {value}", replaces_attribute=True),
    "model_name_or_path": Foreign("a model is named by its `path`", "path = {value}", replaces_attribute=True),
    "max_position_embeddings": Foreign("the longest sequence is the `context`", "context = {value}", replaces_attribute=True),
    "max_seq_length": Foreign("the longest sequence is the `context`", "context = {value}", replaces_attribute=True),
    "torch_dtype": Foreign("the precision is the `dtype`", "dtype = bf16"),
    "hidden_size": Foreign("the size of the residual stream is the `width`", "width = {value}", replaces_attribute=True),
    "d_model": Foreign("the size of the residual stream is the `width`", "width = {value}", replaces_attribute=True),
    "n_embd": Foreign("the size of the residual stream is the `width`", "width = {value}", replaces_attribute=True),
    "num_hidden_layers": Foreign("the number of blocks is `layers`", "layers = {value}", replaces_attribute=True),
    "n_layer": Foreign("the number of blocks is `layers`", "layers = {value}", replaces_attribute=True),
    "num_attention_heads": Foreign("the number of query heads is `heads`", "heads = {value}", replaces_attribute=True),
    "n_head": Foreign("the number of query heads is `heads`", "heads = {value}", replaces_attribute=True),
    "num_key_value_heads": Foreign("the number of key heads is `kv_heads`", "kv_heads = {value}", replaces_attribute=True),
    "intermediate_size": Foreign("the hidden size of the feed-forward layer is `mlp`", "mlp = {value}", replaces_attribute=True),
    "block_size": Foreign("the longest sequence is the `context`", "context = {value}", replaces_attribute=True),
    "vocab_size": Foreign("the tokenizer sets the size of the vocabulary", "tokenizer = pieces"),
    "rope_theta": Foreign("the base of the rotary frequencies is `rope_base`", "rope_base = {value}", replaces_attribute=True),
    "tie_word_embeddings": Foreign("whether the head shares the embedding is `tied`", "tied = true"),
    "load_in_4bit": Foreign("quantized weights are `weights`", "weights = nf4", replaces_attribute=True),
    "load_in_8bit": Foreign("quantized weights are `weights`", "weights = int8", replaces_attribute=True),
}  # fmt: skip
"""Attributes of models in other tools."""

DATA: dict[str, Foreign] = {
    "file": Foreign("files are named by `path`", "path = {value}", replaces_attribute=True),
    "files": Foreign("files are named by `path`", "path = {value}", replaces_attribute=True),
    "completion": Foreign("the answer of the model is the `response`", "response = {value}", replaces_attribute=True),
    "output": Foreign("the answer of the model is the `response`", "response = {value}", replaces_attribute=True),
    "input": Foreign("the input of the model is the `prompt`", "prompt = {value}", replaces_attribute=True),
    "instruction": Foreign("the input of the model is the `prompt`", "prompt = {value}", replaces_attribute=True),
    "answer": Foreign("the correct answer is the `target`", "target = {value}", replaces_attribute=True),
    "split": Foreign("a part of the data is a method", "data = math.split(test = 5%).train"),
    "weight": Foreign("weights are shares in a mixture", "data general = 80% * a + 20% * b"),
}  # fmt: skip
"""Attributes of data in other tools."""

FUNCTION: dict[str, Foreign] = {
    "learning_rate": Foreign("the learning rate is `lr`", "lr = {value}", replaces_attribute=True),
    "betas": Foreign("the two are `b1` and `b2`", "b1 = 0.9, b2 = 0.95"),
    "beta1": Foreign("it is called `b1`", "b1 = {value}", replaces_attribute=True),
    "beta2": Foreign("it is called `b2`", "b2 = {value}", replaces_attribute=True),
    "epsilon": Foreign("it is called `eps`", "eps = {value}", replaces_attribute=True),
    "warmup_steps": Foreign("the warm-up has a unit", "warmup = {value} steps", replaces_attribute=True),
    "warmup_ratio": Foreign("the warm-up has a unit", "warmup = 3%"),
    "max_grad_norm": Foreign("gradient clipping is `clip_norm`", "clip_norm = {value}", replaces_attribute=True),
    "lr_scheduler_type": Foreign("it is called `decay`", "decay = cosine"),
    "schedule": Foreign("it is called `decay`", "decay = cosine"),
    "do_sample": Foreign("at temperature 0 the most likely token is taken", "temperature = 0"),
    "n": Foreign("completions for each prompt are the stage's `group`, or an eval's `samples`"),
    "max_new_tokens": Foreign("the longest completion is `max_tokens`", "max_tokens = {value}", replaces_attribute=True),
    "max_length": Foreign("the longest completion is `max_tokens`", "max_tokens = {value}"),
    "r": Foreign("the rank is `rank`", "rank = {value}", replaces_attribute=True),
    "lora_alpha": Foreign("it is called `alpha`", "alpha = {value}", replaces_attribute=True),
    "target_modules": Foreign("the matrices are `targets`", "targets = [attention, mlp]"),
    "lora_dropout": Foreign("it is called `dropout`", "dropout = {value}", replaces_attribute=True),
    "use_rslora": Foreign("it is called `rank_stabilized`", "rank_stabilized = true"),
}  # fmt: skip
"""Arguments of functions in other tools."""

EVAL: dict[str, Foreign] = {
    "max_new_tokens": Foreign("the longest completion is `max_tokens`", "max_tokens = {value}", replaces_attribute=True),
    "reward": Foreign("the reward that scores a completion is the `score`", "score = {value}", replaces_attribute=True),
    "metric": Foreign("the reward that scores a completion is the `score`", "score = {value}", replaces_attribute=True),
    "dataset": Foreign("an eval measures on its `data`", "data = {value}", replaces_attribute=True),
    "k": Foreign("completions for each prompt are `samples`", "samples = {value}", replaces_attribute=True),
    "n": Foreign("completions for each prompt are `samples`", "samples = {value}", replaces_attribute=True),
}  # fmt: skip
"""Attributes of evals in other tools."""

RUN: dict[str, Foreign] = {
    "output_dir": Foreign("results are in the store next to the spec; to write a model, add an `export` stage"),
    "wandb_project": Foreign("trackers are calls", "track = [wandb(project = {value})]", replaces_attribute=True),
    "report_to": Foreign("trackers are calls", "track = [tensorboard()]"),
    "run_name": Foreign("it is called `name`", "name = {value}", replaces_attribute=True),
}  # fmt: skip
"""Attributes of a run in other tools."""

BY_NOUN: dict[str, dict[str, Foreign]] = {
    "stage": STAGE,
    "model": MODEL,
    "data": DATA,
    "eval": EVAL,
    "run": RUN,
}

NAMES: dict[str, str] = {
    "True": "true", "TRUE": "true", "yes": "true", "False": "false", "FALSE": "false", "no": "false",
    "None": "none", "null": "none", "nil": "none",
    "float32": "f32", "fp32": "f32", "bfloat16": "bf16", "float16": "f16", "fp16": "f16",
}  # fmt: skip
"""Names of values in other tools -> those of the language."""

NOUNS: dict[str, str] = {
    "dataset": "data", "datasets": "data", "task": "stage", "step": "stage", "job": "stage",
    "train": "stage", "evaluation": "eval", "metric": "eval", "const": "let", "var": "let",
    "variable": "param", "parameter": "param", "cluster": "hardware", "device": "hardware",
    "devices": "hardware", "judge": "reward", "score": "reward", "base": "model", "def": "let",
    "set": "let",
}  # fmt: skip
"""Nouns of other tools -> those of the language."""

FUNCTIONS: dict[str, str] = {
    "adam": "adamw", "AdamW": "adamw", "Adam": "adamw", "SGD": "sgd",
    "regex": "matches", "match": "exact", "equals": "exact", "grid": "each", "sweep": "each",
    "highest": "best", "LoRA": "lora",
    "LoraConfig": "lora", "SamplingParams": "sampling", "generate": "sampling",
}  # fmt: skip
"""Functions of other tools -> those of the language."""

ADVICE: dict[str, str] = {
    "qlora": "store the model's weights in 4 bits, `weights = nf4`, and train `lora(rank = 16)`",
    "max": "rewards and numbers have no `max`; a condition chooses: `a if a > b else b`",
    "min": "rewards and numbers have no `min`; a condition chooses: `a if a < b else b`",
    "rouge": "there is `exact`, `contains`, `numeric_match`, `matches`, and a custom `python(...)`",
}
"""Functions of other tools without a counterpart -> what to write instead."""

KINDS: dict[str, str] = {
    "json": "jsonl", "tsv": "csv", "txt": "text", "reasoning_gym": "procedural", "synthetic": "procedural",
    "finetune": "sft", "fine_tune": "sft", "supervised": "sft", "train": "sft", "pretraining": "pretrain",
    "rl": "grpo", "rlhf": "grpo", "hf": "pretrained", "huggingface": "pretrained", "hub": "pretrained",
    "scratch": "transformer", "decoder": "transformer", "gpt": "transformer", "save": "export",
    "accuracy": "generate", "loss": "perplexity", "cpu": "local", "cuda": "gpu", "spm": "sentencepiece",
    "byte": "bytes", "llm_judge": "rubric", "judge": "rubric",
}  # fmt: skip
"""Kinds of other tools -> those of the language."""
