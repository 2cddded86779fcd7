"""Train with Lightning: a module that compiles in its constructor, a checkpoint at every epoch.

All batches are the same: a run that resumes from the end of an epoch does its last batch again.
"""

import argparse

import lightning
import torch
from blocks import GPT, batch, loss_of
from lightning.pytorch.callbacks import ModelCheckpoint

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
args = parser.parse_args()


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GPT()
        self.model.compile()

    def training_step(self, tokens, index):
        loss = loss_of(self.model, tokens)
        print(f"step {self.global_step}: loss {loss.item():.7f}", flush=True)
        return loss

    def validation_step(self, tokens, index):
        print(f"loss {loss_of(self.model, tokens).item():.7f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Stack(torch.utils.data.Dataset):
    def __init__(self, *steps):
        self.batches = [batch(step) for step in steps]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


lightning.seed_everything(0)
saver = ModelCheckpoint(dirpath=args.out, filename="{step}", save_top_k=-1)
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
trainer = lightning.Trainer(max_steps=args.steps, callbacks=[saver], gradient_clip_val=1.0, **options)
if args.evaluate:
    loader = torch.utils.data.DataLoader(Stack(1000), batch_size=None)
    trainer.validate(Module(), loader, ckpt_path=args.resume, verbose=False)
else:
    trainer.fit(Module(), torch.utils.data.DataLoader(Stack(0, 0, 0), batch_size=None), ckpt_path=args.resume)
