"""Tiny configurations, one for every architecture of mlx-lm.

A configuration has the fields of the type's own `config.json`, so that mlx-lm's code reads it.
Every kind of layer occurs (sliding and full, dense and mixture of experts, attention and
recurrent), and whatever depends on the distance between tokens acts within a prompt of 14 tokens.
"""

from typing import Any

Config = dict[str, Any]

VOCAB = 89
HIDDEN = 64
HEAD_DIM = 16
LAYERS = 4
WINDOW = 6  # tokens a sliding layer sees, the query itself included

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
DENSE_FIRST = [0] + [1] * (LAYERS - 1)  # 1 marks a mixture-of-experts layer
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
# Query scales grow at each multiple of `original_max_position_embeddings`.
LLAMA_4_ROPE = {**ROPE, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 5}

#: Offered to every type, which takes the fields that it knows.
GENERIC: Config = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    # Windows
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "layer_types": [SLIDING, FULL],  # repeated for all layers
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # Multi-head latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # Recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": True,
    "mamba_conv_bias": True,
    "state_size": 16,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": (0.001, 10.0),
    # Lightning indexers (DeepSeek sparse attention): select 6 of the keys
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 6,
    # Multipliers (granite, minicpm, falcon)
    "attention_multiplier": 0.3,
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.8,
    "logit_scale": 1.0,
    "dim_model_base": 48,
    "scale_depth": 1.4,
    "scale_emb": 4.0,
    # Soft caps low enough to bend the scores
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": HEAD_DIM,
}

#: Types whose language model is another type's: the configuration of the inner one is nested.
WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}

#: What `GENERIC` does not give, or gives wrongly, for a type. Where the configuration of the
#: language model is nested, these fields go there.
SPECIAL: dict[str, Config] = {
    "afm7": {
        "hidden_dim": HIDDEN,
        "num_layers": LAYERS,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 1.5,
    },
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_moe": {"partial_rotary_factor": 0.5},
    "bailing_moe_v3": {"moe_shared_expert_intermediate_size": 32, "short_conv_kernel_size": 4},
    "dbrx": {
        "d_model": HIDDEN,
        "n_layers": 3,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v3": {"rope_scaling": YARN, "n_group": 2, "topk_group": 1},
    "deepseek_v41": {
        "head_dim": 24,  # no multiple of 16, so that the keys are not rounded to fp8 or fp4
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2],
        "index_topk": 3,
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "compress_rope_theta": 10000.0,
        "hc_mult": 2,
        "rms_norm_eps": 1e-6,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
        "moe_use_aux_free": True,
    },
    "exaone": {"num_layers": 3},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [bool(moe) for moe in DENSE_FIRST]},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "projectors_bias": True,
        "lm_head_multiplier": 1.0,
        "key_multiplier": 1.0,
        "ssm_multipliers": [0.7, 0.9, 1.1, 1.0, 0.8],
    },
    "gear": {"layer_types": [SLIDING, "conv_mixer", FULL, "conv_mixer"]},
    "gemma3n": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "rope_local_base_freq": 5000.0,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "altup_coef_clip": 10.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "rope_scaling": None,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "gpt2": {"n_ctx": 512, "n_embd": HIDDEN, "n_head": 4, "n_layer": 3, "n_positions": 512},
    "gpt_bigcode": {
        "n_embd": HIDDEN,
        "n_head": 4,
        "n_inner": 96,
        "n_layer": 3,
        "n_positions": 512,
        "num_key_value_heads": None,  # one, by `multi_query`
    },
    # No grouped queries.
    "gpt_neox": {"num_key_value_heads": 4, "rotary_emb_base": 10000.0, "rotary_pct": 0.5},
    "gptj": {"n_embd": HIDDEN, "n_head": 4, "n_layer": 3, "n_positions": 512, "rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_groups": 2},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"}},
    "iquestloopcoder": {"num_hidden_layers": 2, "loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "num_heads": 4,
            "head_dim": HEAD_DIM,
            "short_conv_kernel_size": 4,
        },
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "num_heads": 4,
            "head_dim": HEAD_DIM,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
    },
    "laguna": {
        "num_attention_heads_per_layer": [4, 8, 4, 8],
        "rope_parameters": {SLIDING: ROPE, FULL: {**ROPE, **YARN}},
    },
    "lfm2": {
        "layer_types": ["conv", FULL],
        "conv_bias": True,
        "conv_L_cache": 3,
        "block_dim": HIDDEN,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {
        "layer_types": ["conv", FULL],
        "conv_bias": True,
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    "lille-130m": {"block_size": 512, "n_embd": HIDDEN, "n_head": 4, "n_kv_heads": 2, "n_layer": 3},
    "llama4": {
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
        "rope_scaling": None,
        "floor_scale": 4,  # the temperature of the layers without RoPE rises every 4 positions
        "attn_scale": 0.3,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 1,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {"use_bcdt_rms": True},
    "mamba2": {"num_heads": 4},
    "mellum": {"rope_parameters": {SLIDING: ROPE, FULL: {**ROPE, **YARN}}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": DENSE_FIRST,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "swa_rope_theta": 5000.0,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": HEAD_DIM,
        "swa_v_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": None,
        "attention_value_scale": 0.7,
    },
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 256,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 1.2, 1.5, 2.0],
        }
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "dense_intermediate_size": 96,
        "layer_types": [FULL, "sparse_attention"],
        "moe_layer_freq": DENSE_FIRST,
        "index_block_size": 3,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
    },
    "ministral3": {"rope_parameters": LLAMA_4_ROPE},
    "mistral4": {"rope_parameters": LLAMA_4_ROPE},
    "muse_glimmer": {"post_norm_eps": 1e-6, "output_multiplier": 1.0},
    "muse_spark": {
        "post_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "layer_rope_theta": [10000.0, 0.0] * 2,
        "output_multiplier": 1.0,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nanbeige": {"num_hidden_layers": 2, "num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E", "M", "*"],
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 32,
    },
    "olmo": {
        "d_model": HIDDEN,
        "n_layers": 3,
        "n_heads": 4,
        "mlp_hidden_size": 96,
        "embedding_size": VOCAB,
    },
    "olmo_hybrid": {"layer_types": [LINEAR, FULL], "linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": HIDDEN,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [2, 1, 2],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "mup_attn_multiplier": 4.0,
        "mup_width_multiplier": 1.0,
    },
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": HIDDEN,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": HEAD_DIM, "mamba_step": 2},
    "prism_hadamard_qwen35": {"intermediate_size": 512},
    "qwen": {"kv_channels": HEAD_DIM, "no_bias": False},
    "qwen3_5": {"num_experts": 0, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "qwen3_5_moe": {"num_experts": 4},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 4,
        "logits_soft_cap": 5.0,
        "attention_window_size": WINDOW,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": {"attention_out_bias": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "spark2_5": {
        "rope_parameters": {SLIDING: {**ROPE, "partial_rotary_factor": 0.5}, FULL: ROPE},
    },
    "stablelm": {"qk_layernorm": True},
    "step3p5": {
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 4},
        "partial_rotary_factors": [1.0, 0.5, 1.0, 0.5],
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,3",
    },
}
SPECIAL["longcat_flash_ngram"] = {
    **SPECIAL["longcat_flash"],
    "ngram_vocab_size_ratio": 2,
    "emb_neighbor_num": 3,
    "emb_split_num": 2,
}

#: Fields of the outer configuration of a type with a nested one.
OUTER: dict[str, Config] = {
    "prism_hadamard_qwen35": {
        "schema_version": 2,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.1.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 512,
            }
        ],
    },
}
