"""Small models of Hugging Face's families, made of their configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_IDS = torch.tensor([[5, 3, 8, 1, 2, 9, 7, 4, 6], [2, 9, 4, 7, 7, 1, 3, 0, 0]])
_MASK = (_IDS > 0).long()


def _text(model: str, config: str, **sizes: Any) -> Callable[[], Built]:
    """A model of text, called with what a tokenizer gives."""

    def make() -> Built:
        import transformers

        made = getattr(transformers, config)(**sizes)
        return getattr(transformers, model)(made), (), {"input_ids": _IDS, "attention_mask": _MASK}

    return make


def _images(model: str, config: str, size: int, **sizes: Any) -> Callable[[], Built]:
    def make() -> Built:
        import transformers

        made = getattr(transformers, config)(**sizes)
        images = torch.randn(2, 3, size, size)
        return getattr(transformers, model)(made), (), {"pixel_values": images}

    return make


_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def _t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _IDS, "attention_mask": _MASK, "decoder_input_ids": _IDS.flip(1)}
    return T5ForConditionalGeneration(config), (), inputs


def _whisper_encoder() -> Built:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=64, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config).encoder, (), {"input_features": torch.randn(2, 16, 40)}


def _clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = {**_ENCODER, "eos_token_id": 9, "bos_token_id": 1, "pad_token_id": 0}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    images = torch.randn(2, 3, 32, 32)
    inputs = {"input_ids": _IDS, "attention_mask": _MASK, "pixel_values": images}
    return CLIPModel(config), (), inputs


def _detr() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        num_queries=10, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=5,
    )  # fmt: skip
    return DetrForObjectDetection(config), (), {"pixel_values": torch.randn(2, 3, 64, 64)}


_SEGFORMER = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
    "num_labels": 4,
}

TRANSFORMERS: dict[str, Callable[[], Built]] = {
    "transformers/gpt2": _text(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4
    ),
    "transformers/qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **_DECODER),
    "transformers/qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=8),
    "transformers/mistral": _text("MistralForCausalLM", "MistralConfig", **_DECODER),
    "transformers/gemma2": _text("Gemma2ForCausalLM", "Gemma2Config", **_DECODER, head_dim=8),
    "transformers/phi3": _text("Phi3ForCausalLM", "Phi3Config", **_DECODER, pad_token_id=0),
    "transformers/mixtral": _text(
        "MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4, num_experts_per_tok=2
    ),
    "transformers/roberta": _text(
        "RobertaForSequenceClassification", "RobertaConfig", **_ENCODER, pad_token_id=0
    ),
    "transformers/deberta_v2": _text(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **_ENCODER,
        relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "transformers/modernbert": _text(
        "ModernBertForSequenceClassification", "ModernBertConfig", **_ENCODER, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    "transformers/t5": _t5,
    "transformers/whisper_encoder": _whisper_encoder,
    "transformers/clip": _clip,
    "transformers/segformer": _images(
        "SegformerForSemanticSegmentation", "SegformerConfig", 64, **_SEGFORMER
    ),
    "transformers/dinov2": _images(
        "Dinov2Model", "Dinov2Config", 56, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        image_size=56, patch_size=14,
    ),
    "transformers/detr": _detr,
}  # fmt: skip
"""Name to model and example call."""
