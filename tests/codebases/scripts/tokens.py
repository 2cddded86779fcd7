"""Random tokens for litgpt, with a loader whose position can be saved."""

import torch
from litgpt.data import DataModule
from torch.utils.data import DataLoader


class Batches(DataLoader):
    """Batches that are all the same, so that there is no position to save."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


class Tokens(DataModule):
    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size, self.length = batch_size, max_seq_length

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)

    def _loader(self, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.vocabulary, (self.batch_size, self.length + 1), generator=generator)
        return Batches(tokens, batch_size=self.batch_size)
