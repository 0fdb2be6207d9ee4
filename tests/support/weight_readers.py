"""Tiny models whose code reads the weight of a linear layer in a way that some containers can satisfy."""

from __future__ import annotations

from typing import Final

import torch
from transformers import PreTrainedModel

from support.families import VOCABULARY, WIDTH, Family, Inputs

_T5: Final = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_GATED: Final = {**_T5, "feed_forward_proj": "gated-gelu"}
_SPARSE: Final = {
    "num_experts": 2,
    "expert_capacity": 16,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
_PIX2STRUCT: Final = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 1,
        "num_heads": 4,
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "patch_embed_hidden_size": WIDTH,
        "d_ff": 128,
        "d_kv": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "seq_len": 16,
    },
}
_NLLB: Final = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "num_experts": 2,
    "expert_capacity": 16,
}
_JAMBA: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 64,
}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _ids(count: int) -> torch.Tensor:
    return torch.tensor([[5, 17, 3, 41, 8, 60][:count]])


def _text(model: PreTrainedModel) -> Inputs:
    return {"input_ids": _ids(6)}


def _pair(model: PreTrainedModel) -> Inputs:
    return {"input_ids": _ids(6), "decoder_input_ids": _ids(3)}


def _patches(model: PreTrainedModel) -> Inputs:
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])[None]  # row and column come first
    return {"flattened_patches": torch.cat([places, _noise(1, 4, WIDTH)], -1), "decoder_input_ids": _ids(3)}


def _document(model: PreTrainedModel) -> Inputs:
    boxes = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(7))
    return {"input_ids": _ids(4), "bbox": boxes, "decoder_input_ids": _ids(3), "pixel_values": _noise(1, 3, 32, 32)}


def _sound(model: PreTrainedModel) -> Inputs:
    return {"inputs_embeds": _noise(1, 6, WIDTH), "decoder_input_ids": _ids(3)}


def _seq2seq(model_class: str, config: dict[str, object]) -> Family:
    return Family("AutoModelForSeq2SeqLM", model_class, config, _pair)


# Their code asks for the dtype of `wo.weight`; those in FLOAT32 are on transformers' list of float32 modules, too.
DTYPE_READERS: Final[dict[str, Family]] = {
    "t5": _seq2seq("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "relu"}),
    "t5_gated": _seq2seq("T5ForConditionalGeneration", _GATED),
    "umt5": _seq2seq("UMT5ForConditionalGeneration", _GATED),
    "mt5": _seq2seq("MT5ForConditionalGeneration", _GATED),
    "longt5": _seq2seq("LongT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "relu", "local_radius": 7}),
    "switch_transformers": _seq2seq("SwitchTransformersForConditionalGeneration", {**_T5, **_SPARSE}),
    "pix2struct": Family(
        "Pix2StructForConditionalGeneration", "Pix2StructForConditionalGeneration", _PIX2STRUCT, _patches
    ),
    "udop": Family(
        "UdopForConditionalGeneration",
        "UdopForConditionalGeneration",
        {**_T5, "image_size": 32, "patch_size": 16, "num_channels": 3, "max_2d_position_embeddings": 64},
        _document,
    ),
    "pop2piano": Family("Pop2PianoForConditionalGeneration", "Pop2PianoForConditionalGeneration", _T5, _sound),
}
FLOAT32: Final = ("t5", "t5_gated", "umt5", "mt5", "udop", "pop2piano")

# NLLB's code checks for packed weights itself; Jamba's uses the values of `dt_proj.weight` without a quantizer only.
NLLB_MOE: Final = _seq2seq("NllbMoeForConditionalGeneration", _NLLB)
JAMBA: Final = Family("AutoModelForCausalLM", "JambaForCausalLM", _JAMBA, _text)
