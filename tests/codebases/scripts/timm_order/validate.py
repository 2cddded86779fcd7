"""Validate a checkpoint in the order of timm's validate.py: model, checkpoint, perhaps compile."""

import argparse
import json

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--model-kwargs", type=json.loads, default={})
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--checkpoint")
parser.add_argument("--use-ema", action="store_true")
parser.add_argument("--torchcompile", nargs="?", const="inductor")
args = parser.parse_args()

model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
data_config = resolve_data_config(vars(args), model=model, use_test_size=True)
if args.torchcompile:
    model = torch.compile(model, backend=args.torchcompile)
dataset = create_dataset("", root=args.data_dir, split="validation")
loader = create_loader(
    dataset,
    data_config["input_size"],
    batch_size=8,
    use_prefetcher=False,
    num_workers=0,
    crop_pct=1.0,
    mean=data_config["mean"],
    std=data_config["std"],
    device=torch.device("cpu"),
)
model.eval()
with torch.inference_mode():
    losses = [torch.nn.functional.cross_entropy(model(images), labels) for images, labels in loader]
print(f"loss {torch.stack(losses).mean().item():.6f}")
