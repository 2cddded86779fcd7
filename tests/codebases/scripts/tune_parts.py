"""A data set and a tokenizer for torchtune's recipes, named in their configuration."""

from blocks import batch
from torch.utils.data import Dataset


class Tokens(Dataset):
    def __init__(self, tokenizer):
        self.rows = batch(0).tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index], "labels": self.rows[index]}


class Tokenizer:
    pad_id = 0
    max_seq_len = None
    vocab_size = 32
