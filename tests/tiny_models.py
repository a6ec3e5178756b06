"""Tiny models of transformers with random weights: a name gives a class and a configuration."""

import torch
import transformers

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_WINDOW = {"head_dim": 16, "sliding_window": 5}
_OLD = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
_INDEXER = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
_LLAMA4 = {
    "head_dim": 16,
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 64,
    "num_experts_per_tok": 1,
    "no_rope_layers": [1, 0],
}
_GPT_NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 5}

DECODERS = {
    "Llama": _GROUPED,
    "Mistral": {**_GROUPED, "sliding_window": 5},
    "Qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {**_GROUPED, "head_dim": 16},
    "Gemma2": {**_GROUPED, **_WINDOW},
    "Gemma3Text": {
        **_GROUPED,
        **_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GptOss": {**_GROUPED, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {**_OLD, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 64},
    "GPTNeoX": _DECODER,
    "Phi3": {**_GROUPED, "sliding_window": 5},
    "Llama4Text": {**_GROUPED, **_LLAMA4},
    "DeepseekV3": {**_DECODER, **_DEEPSEEK},
    "GPTJ": {**_OLD, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}
# Not computed with numattn, or not all of it.
OTHER_DECODERS = {
    "Git": _DECODER,  # the attention of its texts is its own
    "DeepseekV32": {**_DECODER, **_DEEPSEEK, **_INDEXER},  # chooses keys
}
# These compute attention by themselves.
DECODERS_WITHOUT_INTERFACE = {
    "Bloom": {**_OLD, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {**_OLD, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Falcon": {**_OLD, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPTNeo": {**_OLD, **_GPT_NEO, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
}

_ENCODER = {key: value for key, value in _DECODER.items() if key != "eos_token_id"}
_T5 = {
    "vocab_size": 99,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}
_BART = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_WHISPER = {
    "max_source_positions": 20,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_WAV2VEC2 = {
    **_ENCODER,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
}
_PICTURES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
_DISTILBERT = {"vocab_size": 99, "dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
_MODERNBERT = {"local_attention": 6, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_T5GEMMA = {**_GROUPED, **_WINDOW}
_TEXT_AND_PICTURES = {"text_config": {**_ENCODER, "eos_token_id": 98}, "vision_config": _PICTURES}

# Class, prefix of its configuration's name, configuration, what it takes.
ENCODERS_AND_PAIRS = {
    "BERT": ("BertModel", "Bert", _ENCODER, "text"),
    "BERT with cross-attention": (
        "BertLMHeadModel",
        "Bert",
        {**_ENCODER, "is_decoder": True, "add_cross_attention": True},
        "text and states",
    ),
    "RoBERTa": ("RobertaModel", "Roberta", _ENCODER, "text"),
    "DistilBERT": ("DistilBertModel", "DistilBert", _DISTILBERT, "text"),
    "ModernBERT": ("ModernBertModel", "ModernBert", {**_ENCODER, **_MODERNBERT}, "text"),
    "ALBERT": ("AlbertModel", "Albert", {**_ENCODER, "embedding_size": 16}, "text"),
    "ESM": ("EsmModel", "Esm", {**_ENCODER, "position_embedding_type": "rotary"}, "text"),
    "T5": ("T5ForConditionalGeneration", "T5", _T5, "pair"),
    "UMT5": ("UMT5ForConditionalGeneration", "UMT5", _T5, "pair"),
    "BART": ("BartForConditionalGeneration", "Bart", _BART, "pair"),
    "Marian": ("MarianMTModel", "Marian", _BART, "pair"),
    "Whisper": ("WhisperForConditionalGeneration", "Whisper", {**_BART, **_WHISPER}, "sound"),
    "Wav2Vec2": ("Wav2Vec2Model", "Wav2Vec2", _WAV2VEC2, "wave"),
    "ViT": ("ViTModel", "ViT", _PICTURES, "pictures"),
    "DINOv2": ("Dinov2Model", "Dinov2", _PICTURES, "pictures"),
    "Swin": ("SwinModel", "Swin", {**_SWIN, "window_size": 4}, "pictures"),
    "CLIP": ("CLIPModel", "CLIP", _TEXT_AND_PICTURES, "text and pictures"),
    "SigLIP": ("SiglipModel", "Siglip", _TEXT_AND_PICTURES, "text and pictures"),
    "T5Gemma": (
        "T5GemmaForConditionalGeneration",
        "T5Gemma",
        {
            "encoder": _T5GEMMA,
            "decoder": _T5GEMMA,
            "vocab_size": 99,
            "bos_token_id": 1,
            "eos_token_id": None,
            "decoder_start_token_id": 1,
        },
        "pair",
    ),
}


def decoder(family, **options):
    """Return a language model that computes as "eager" does."""
    kinds = {**DECODERS, **OTHER_DECODERS, **DECODERS_WITHOUT_INTERFACE}
    config = getattr(transformers, f"{family}Config")(**kinds[family], **options)
    return _filled(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    )


def encoder(name):
    """Return an encoder or a pair of encoder and decoder that computes as "eager" does."""
    model, prefix, options, _ = ENCODERS_AND_PAIRS[name]
    config = getattr(transformers, f"{prefix}Config")(**options)
    return _filled(getattr(transformers, model)._from_config(config, attn_implementation="eager"))


def _filled(model):
    """Fill a model with weights that make attention look at single tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 0.15 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


def tokens(padding="none", batch=2, length=13):
    """Return tokens and their mask; the first item is `padding` on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 98, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    padded = {"none": slice(0), "left": slice(0, 4), "right": slice(-4, None)}[padding]
    mask[0, padded] = 0
    ids[0, padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(kind):
    """Return what an encoder or a pair takes."""
    generator = torch.Generator().manual_seed(2)

    def floats(*shape):
        return torch.randn(shape, generator=generator)

    text = tokens("right")
    decoder_ids = torch.randint(3, 98, (2, 7), generator=generator)
    pictures = {"pixel_values": floats(2, 3, 32, 32)}
    if kind == "text and pictures":
        text["input_ids"][:, 8] = 98  # the end of the text, whose state CLIP takes
    states_mask = torch.ones(2, 9, dtype=torch.long)
    states_mask[1, 6:] = 0
    wave_mask = torch.ones(2, 400, dtype=torch.long)
    wave_mask[1, 300:] = 0
    return {
        "text": text,
        "text and states": {
            **text,
            "encoder_hidden_states": floats(2, 9, 64),
            "encoder_attention_mask": states_mask,
        },
        "pair": {**text, "decoder_input_ids": decoder_ids},
        "sound": {"input_features": floats(2, 8, 40), "decoder_input_ids": decoder_ids},
        "wave": {"input_values": floats(2, 400), "attention_mask": wave_mask},
        "pictures": pictures,
        "text and pictures": {**text, **pictures},
    }[kind]
