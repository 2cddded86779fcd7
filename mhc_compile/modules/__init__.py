"""The `nn.Module`s that own the parameters of hyper-connections and read-outs."""
