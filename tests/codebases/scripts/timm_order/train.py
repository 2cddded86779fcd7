"""Train a timm model in the order of timm's train.py, which its package does not install.

Model, task, optimizer, resume, average of weights, torch.compile of task and average, DDP, saver,
scheduler; then epochs of training, validation of both models, checkpoint.
"""

import argparse
import json

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad, get_outdir, init_distributed_device, random_seed

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--model-kwargs", type=json.loads, default={})
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-2)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--clip-mode", default="norm")
parser.add_argument("--layer-decay", type=float)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--resume")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--model-ema-decay", type=float, default=0.9)
parser.add_argument("--torchcompile", nargs="?", const="inductor")
parser.add_argument("--torchcompile-mode")
parser.add_argument("--output", default="output")
parser.add_argument("--experiment", default="train")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=42)


@torch.inference_mode()
def validate(model, loader, device):
    model.eval()
    outputs = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    return {"loss": torch.stack([torch.nn.functional.cross_entropy(*pair) for pair in outputs]).mean().item()}


def main():
    args = parser.parse_args()
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device=device)

    common = dict(batch_size=args.batch_size, num_workers=0, pin_memory=False, device=device, use_prefetcher=False)
    common |= dict(mean=data_config["mean"], std=data_config["std"], distributed=args.distributed)
    train_set = create_dataset("", root=args.data_dir, split="train", is_training=True)
    val_set = create_dataset("", root=args.data_dir, split="validation", is_training=False)
    loader_train = create_loader(train_set, data_config["input_size"], is_training=True, no_aug=True, **common)
    loader_eval = create_loader(val_set, data_config["input_size"], is_training=False, crop_pct=1.0, **common)

    task = ClassificationTask(model=model, criterion=LabelSmoothingCrossEntropy(), device=device, verbose=False)
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed()
    model = task.get_trainable_module()

    folder = get_outdir(args.output, args.experiment)
    saver = CheckpointSaver(
        model=model, optimizer=optimizer, args=args, checkpoint_dir=folder, decreasing=True, task=task, max_history=9
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=True), updates_per_epoch=len(loader_train)
    )
    if start_epoch > 0:
        scheduler.step(start_epoch)
    updates = start_epoch * len(loader_train)
    for epoch in range(start_epoch, epochs):
        model.train()
        optimizer.zero_grad()
        for images, labels in loader_train:
            loss = task(images.to(device), labels.to(device))["loss"]
            loss.backward()
            if args.clip_grad is not None:
                dispatch_clip_grad(task.get_clip_parameters("agc" in args.clip_mode), args.clip_grad, args.clip_mode)
            optimizer.step()
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
            scheduler.step_update(num_updates=updates)
        metrics = validate(task.get_eval_model(), loader_eval, device)
        print(f"epoch {epoch}: train {loss.item():.6f}, validation {metrics['loss']:.6f}", flush=True)
        if task.has_ema():
            metrics = validate(task.get_eval_model(ema=True), loader_eval, device)
            print(f"epoch {epoch}: average, validation {metrics['loss']:.6f}", flush=True)
        saver.save_checkpoint(epoch, metric=metrics["loss"])
        scheduler.step(epoch + 1, metrics["loss"])


if __name__ == "__main__":
    main()
