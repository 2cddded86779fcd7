"""Train a language model in the order of transformers' example run_clm.py.

Arguments, configuration or checkpoint, model, data, Trainer; train, save, evaluate, generate.
"""

from dataclasses import dataclass

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    model_name_or_path: str | None = None
    model_type: str = "gpt2"
    config_overrides: str | None = None


@dataclass
class DataTrainingArguments:
    block_size: int = 16
    blocks: int = 8


model_args, data_args, training_args = HfArgumentParser(
    (ModelArguments, DataTrainingArguments, TrainingArguments)
).parse_args_into_dataclasses()
set_seed(training_args.seed)
if model_args.model_name_or_path:
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
else:
    config = CONFIG_MAPPING[model_args.model_type]()
    config.update_from_string(model_args.config_overrides)
    model = AutoModelForCausalLM.from_config(config)
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, config.vocab_size, (data_args.blocks, data_args.block_size), generator=generator)
blocks = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=blocks if training_args.do_train else None,
    eval_dataset=blocks[:4] if training_args.do_eval else None,
    data_collator=default_data_collator,
)
if training_args.do_train:
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if resume == "last" else resume)
    trainer.save_model()
if training_args.do_eval:
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.6f}")
    prompt = tokens[:1, :3]
    print("generated", model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
