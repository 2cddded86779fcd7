"""A configuration of torchtitan: its Llama 3, tiny, with an attention that the CPU can train."""

from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

LENGTH, BATCH = 16, 2


def batch(rank, step, size=BATCH):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(0, 64, (size, LENGTH + 1), generator=generator)


class Tokens(IterableDataset):
    def __init__(self, rank):
        self.rank, self.rows = rank, 0

    def __iter__(self):
        while True:
            step, row = divmod(self.rows, BATCH)
            self.rows += 1
            tokens = batch(self.rank, step)[row]
            yield {"input": tokens[:-1], "positions": torch.arange(LENGTH)}, tokens[1:]

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


class Loader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **kwargs):
        super().__init__(Tokens(dp_rank), dp_rank, dp_world_size, batch_size=local_batch_size)


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **kwargs):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    def decode(self, *args, **kwargs):
        raise NotImplementedError

    def get_vocab_size(self):
        return 64


def tiny():
    spec = model_registry("debugmodel")
    del spec.model.layers[2:]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        tokenizer=NoTokenizer.Config(),
        dataloader=Loader.Config(),
        optimizer=default_adamw(lr=0.01),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1, decay_ratio=0.8, decay_type="linear"),
        training=TrainingConfig(
            local_batch_size=BATCH, seq_len=LENGTH, steps=6, mixed_precision_param="float32", disable_cuda_graphs=True
        ),
        # "spmd_types", the default, needs a later torch than 2.13.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(enable=True, interval=3, last_save_model_only=False),
    )


def make():
    model = tiny().model_spec.model.build()
    model.init_states()
    return model


def loss_of(model, *batches):
    tokens = torch.cat(batches)
    logits = model(tokens[:, :-1], torch.arange(LENGTH).expand(len(tokens), LENGTH))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()
