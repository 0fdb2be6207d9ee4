"""Tiny random models, one per family, for every test that needs a checkpoint: seeded, two layers, below 1 MB.

Widths are multiples of 64, so that every format can take the matrices. `save_pretrained` writes the family's original
names, which for several families differ from the module paths of transformers 5; that is what makes them useful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

SEED: Final = 20_240_229
WIDTH: Final = 64
VOCABULARY: Final = 96
IMAGE_TOKEN: Final = 95
TOKENS: Final = (5, 17, 3, 41, 8, 60, 2, 33)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture in miniature.

    Attributes:
        auto_class: the Auto class of transformers that loads the checkpoint with all its weights.
        model_class: the class of the model, as it stands in `architectures`.
        config: fields of its config beyond the class's defaults.
        dummy_inputs: a batch of one that runs through every module the model has; tensors on the CPU.
    """

    auto_class: str
    model_class: str
    config: Mapping[str, Any]
    dummy_inputs: Callable[[PreTrainedModel], Inputs]

    def __call__(self) -> PreTrainedModel:
        """Build the model in float32 and evaluation mode, with the same weights every time."""
        cls = getattr(transformers, self.model_class)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return cls(cls.config_class(**self.config)).eval()


def _text(model: PreTrainedModel) -> Inputs:
    return {"input_ids": torch.tensor([TOKENS])}


def _text_pair(model: PreTrainedModel) -> Inputs:
    return {"input_ids": torch.tensor([TOKENS]), "decoder_input_ids": torch.tensor([TOKENS[:5]])}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def _speech(model: PreTrainedModel) -> Inputs:
    frames = 2 * model.config.max_source_positions
    mels = _noise(1, model.config.num_mel_bins, frames)
    return {"input_features": mels, "decoder_input_ids": torch.tensor([TOKENS[:5]])}


def _image(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": _noise(1, 3, model.config.image_size, model.config.image_size)}


def _image_and_text(model: PreTrainedModel) -> Inputs:
    """Four image tokens, for the 2 x 2 patches of a 28 x 28 image."""
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 41, 8]])
    size = model.config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": _noise(1, 3, size, size), "token_type_ids": (ids == IMAGE_TOKEN).long()}


def _llava_inputs(model: PreTrainedModel) -> Inputs:
    return {name: value for name, value in _image_and_text(model).items() if name != "token_type_ids"}


def _patches_and_text(model: PreTrainedModel) -> Inputs:
    """Qwen2-VL takes flat patches: 4 x 4 of them, which its merger turns into 2 x 2 tokens."""
    vision = model.config.vision_config
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 41, 8]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": _noise(16, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


_IDS: Final = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_IDS,
}
_ENCODER: Final = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_SLIM: Final = {key: _DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", *_IDS)}
_VISION: Final = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_EXPERTS: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
_DEEPSEEK: Final = {
    **_DECODER,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": WIDTH,
    "kv_lora_rank": WIDTH,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GEMMA: Final = {**_DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
_BART: Final = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **_IDS,
}


def _causal(model_class: str, **config: Any) -> Family:
    return Family("AutoModelForCausalLM", model_class, config, _text)


def _encoder(auto_class: str, model_class: str, **config: Any) -> Family:
    return Family(auto_class, model_class, config, _text)


FAMILIES: Final[dict[str, Family]] = {
    # decoders, one matrix per projection
    "llama": _causal("LlamaForCausalLM", **_DECODER),
    "llama_tied": _causal("LlamaForCausalLM", **_DECODER, tie_word_embeddings=True),
    "mistral": _causal("MistralForCausalLM", **_DECODER, sliding_window=16),
    "qwen2": _causal("Qwen2ForCausalLM", **_DECODER),
    "qwen3": _causal("Qwen3ForCausalLM", **_DECODER, head_dim=16, tie_word_embeddings=True),
    "gemma2": _causal("Gemma2ForCausalLM", **_GEMMA),
    "gemma3_text": _causal("Gemma3ForCausalLM", **_GEMMA),
    "phi": _causal("PhiForCausalLM", **_DECODER),
    "opt": _causal("OPTForCausalLM", **_ENCODER, ffn_dim=128, word_embed_proj_dim=WIDTH),
    "gptj": _causal("GPTJForCausalLM", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=8, **_IDS),
    # decoders with fused projections or transposed storage
    "phi3": _causal("Phi3ForCausalLM", **_DECODER),
    "gpt2": _causal(
        "GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, **_IDS
    ),
    "gpt_neox": _causal("GPTNeoXForCausalLM", **_ENCODER),
    "bloom": _causal("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4, **_IDS),
    "falcon": _causal("FalconForCausalLM", **_SLIM, num_attention_heads=4),
    # no attention
    "mamba": _causal("MambaForCausalLM", **_SLIM, state_size=8, time_step_rank=8),
    # mixtures of experts
    "mixtral": _causal("MixtralForCausalLM", **{**_DECODER, "intermediate_size": WIDTH}, num_local_experts=4),
    "qwen3_moe": _causal("Qwen3MoeForCausalLM", **_DECODER, **_EXPERTS, num_experts=4, head_dim=16),
    "deepseek_v3": _causal("DeepseekV3ForCausalLM", **_DEEPSEEK),
    "gpt_oss": _causal(
        "GptOssForCausalLM",
        **{**_DECODER, "intermediate_size": WIDTH},
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen2_moe": _causal(
        "Qwen2MoeForCausalLM", **_DECODER, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=WIDTH
    ),
    "deepseek_v2": _causal("DeepseekV2ForCausalLM", **_DEEPSEEK),
    "mistral4": Family(  # no AutoModelForCausalLM: transformers lists its causal class with the multimodal ones
        "AutoModelForImageTextToText",
        "Mistral4ForCausalLM",
        {
            **{key: value for key, value in _DEEPSEEK.items() if key != "first_k_dense_replace"},
            "n_group": 1,
        },
        _text,
    ),
    "olmoe": _causal(
        "OlmoeForCausalLM", **{**_DECODER, "intermediate_size": WIDTH}, num_experts=4, num_experts_per_tok=2
    ),
    "phimoe": _causal(
        "PhimoeForCausalLM", **{**_DECODER, "intermediate_size": WIDTH}, num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoe": _causal(
        "GraniteMoeForCausalLM", **{**_DECODER, "intermediate_size": WIDTH}, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama4": _causal(
        "Llama4ForCausalLM",
        **{**_DECODER, "intermediate_size": WIDTH},
        intermediate_size_mlp=WIDTH,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=16,
        moe_layers=[1],
    ),
    # encoder and decoder
    "t5": Family(
        "AutoModelForSeq2SeqLM",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        _text_pair,
    ),
    "bart": Family("AutoModelForSeq2SeqLM", "BartForConditionalGeneration", _BART, _text_pair),
    "whisper": Family(
        "AutoModelForSpeechSeq2Seq",
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _speech,
    ),
    # encoders
    "bert": _encoder("AutoModel", "BertModel", **_ENCODER),
    "bert_mlm": _encoder("AutoModelForMaskedLM", "BertForMaskedLM", **_ENCODER),
    "bert_classifier": _encoder("AutoModelForSequenceClassification", "BertForSequenceClassification", **_ENCODER),
    "roberta": _encoder("AutoModelForMaskedLM", "RobertaForMaskedLM", **_ENCODER),
    "deberta_v2": _encoder(
        "AutoModelForSequenceClassification",
        "DebertaV2ForSequenceClassification",
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
    ),
    "distilbert": _encoder(
        "AutoModelForSequenceClassification", "DistilBertForSequenceClassification", **_ENCODER, hidden_dim=128
    ),
    "vit": Family("AutoModelForImageClassification", "ViTForImageClassification", _VISION, _image),
    # text and images
    "llava": Family(
        "AutoModelForImageTextToText",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "image_token_index": IMAGE_TOKEN,
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": WIDTH},
        },
        _llava_inputs,
    ),
    "gemma3": Family(
        "AutoModelForImageTextToText",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma3_text", **_GEMMA},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 93,
            "eoi_token_index": 94,
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        },
        _image_and_text,
    ),
    "qwen2_vl": Family(
        "AutoModelForImageTextToText",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                "model_type": "qwen2_vl_text",
                **_DECODER,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": 2,
                "embed_dim": WIDTH,
                "hidden_size": WIDTH,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 94,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
        _patches_and_text,
    ),
}
