"""Fine-tune with LoRA: a pre-trained model, `get_peft_model`, the Trainer; the adapter is saved.

`--pretrain` makes the model that the others load.
"""

import argparse

import torch
from blocks import batch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, default_data_collator

parser = argparse.ArgumentParser()
parser.add_argument("--pretrain", action="store_true")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--resume")
parser.add_argument("--out", default="out")
args = parser.parse_args()

torch.manual_seed(0)
if args.pretrain:
    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=31)
    config = GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    raise SystemExit
model = AutoModelForCausalLM.from_pretrained("base")
if args.evaluate:
    model = PeftModel.from_pretrained(model, args.out).eval()
    tokens = batch(1000)
    with torch.no_grad():
        print(f"loss {model(input_ids=tokens, labels=tokens).loss.item():.7f}")
    raise SystemExit
model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=6,
        save_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=True,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in batch(0, size=8)],
    data_collator=default_data_collator,
)
trainer.train(resume_from_checkpoint=args.resume)
model.save_pretrained(args.out)
