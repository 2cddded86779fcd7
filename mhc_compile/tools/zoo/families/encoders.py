"""Text encoders of transformers: most are post-norm, so that a layer norm stands on the trunk behind every add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SPECIAL, architecture, ids, sizes
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_TWO = chains(lambda n: (2 * n,))


def _call() -> dict[str, Any]:
    import torch

    given = ids()
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def _labelled() -> dict[str, Any]:
    import torch

    return {**_call(), "labels": torch.tensor([0, 1])}


def _deberta(layers: int) -> dict[str, Any]:
    return sizes(
        layers, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], conv_kernel_size=3, conv_act="gelu",
    )  # fmt: skip


def _with_convolution(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(
        (2 * layers,),
        note="behind the first layer a convolution of the embeddings is added, which is not computed from its sum",
    )


def _family(
    name: str, kind: str, settings: Callable[[int], dict[str, Any]] = sizes, expected: Any = _TWO, **more: Any
) -> Family:
    model = more.pop("model", f"{kind}ForMaskedLM")
    return architecture(name, "encoders", kind, model, settings, more.pop("inputs", _call), expected, **more)


FAMILIES: tuple[Family, ...] = (
    _family("bert", "Bert"),
    _family("bert-loss", "Bert", model="BertForSequenceClassification", inputs=_labelled),
    _family("roberta", "Roberta"),
    _family("roberta-pre-norm", "RobertaPreLayerNorm"),
    _family("xlm-roberta-xl", "XLMRobertaXL"),
    _family("electra", "Electra", lambda n: sizes(n, embedding_size=8), model="ElectraForPreTraining"),
    _family("albert", "Albert", lambda n: sizes(n, embedding_size=8)),
    _family("distilbert", "DistilBert", lambda n: {**SPECIAL, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": n,
                                                   "max_position_embeddings": 64}),
    _family("deberta-v2", "DebertaV2", _deberta, _with_convolution),
    _family("modernbert", "ModernBert", lambda n: sizes(n, cls_token_id=1, sep_token_id=2, local_attention=8)),
    _family("xlnet", "XLNet", lambda n: {**SPECIAL, "d_model": 16, "n_layer": n, "n_head": 2, "d_inner": 24}, model="XLNetLMHeadModel"),
    _family("mpnet", "MPNet"),
    _family("roformer", "RoFormer"),
    _family("megatron-bert", "MegatronBert"),
    _family("fnet", "FNet", lambda n: sizes(n, use_tpu_fourier_optimizations=False), inputs=lambda: {"input_ids": ids()}),
)  # fmt: skip
