"""The keys of a config.json that mean the same in every family: what they may be, and which are without effect here.

From the configuration classes of transformers 4 and 5, and from what trainers write into the files that they save. A
family adds its own keys (`Family.keys`). A key that is in neither table is refused, see `rm.json_keys`.
"""

from rm.json_keys import Key

# The limits are far above every model; they keep a damaged file from asking for memory without end.
SIZE = Key(int, minimum=1, maximum=2**24, required=True)
LAYERS = Key(int, minimum=1, maximum=10_000, required=True)
HEADS_OF_A_LAYER = Key(int, minimum=1, maximum=2**16, required=True)
COUNT = Key(int, minimum=1, maximum=2**16)
LENGTH = Key(int, minimum=0, maximum=2**31 - 1)
POSITIONS = Key(int, minimum=1, maximum=2**31 - 1)
FLAG = Key(bool)
OFF = Key(bool, only=(False,))
NUMBER = Key(float, minimum=0)
POSITIVE = Key(float, minimum=1e-12)
AT_LEAST_1 = Key(float, minimum=1)

# The activation functions of transformers -> a key of `MLPS`. The GELU with tanh has three names there, under which
# its constant has more or fewer digits.
_TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
GATED_MLPS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"} | dict.fromkeys(_TANH, "geglu_tanh")
PLAIN_MLPS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"} | dict.fromkeys(_TANH, "gelu_tanh")
GATED_ACTIVATION, ACTIVATION = Key(str, only=tuple(GATED_MLPS)), Key(str, only=tuple(PLAIN_MLPS))

# A reward model's head: transformers' name for it, and those of others. Each is one linear layer.
HEADS = dict.fromkeys(
    (
        "score",
        "value_head",  # OpenRLHF
        "v_head",  # TRL's value heads, Starling, Athene
        "v_head.summary",
        "score_head",  # safe-rlhf
        "regression_head",  # UltraRM, Eurus-RM
        "reward_head",
        "rm_head",
    ),
    "score",
)

# The two layers of a head that has them, by its class (`rules.WITH_TWO_LAYERS`).
LAYERS_OF_HEAD = {"score.{}": "score.{}"}

# The parameters of rotary positions, flat in `rope_parameters` or `rope_scaling`.
ROPE = {
    "rope_type": Key(str),  # `rope` names the implemented ones; the older spelling is `type`
    "type": Key(str),
    "rope_theta": AT_LEAST_1,
    "partial_rotary_factor": NUMBER,
    "factor": AT_LEAST_1,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "original_max_position_embeddings": POSITIONS,
    "attention_factor": NUMBER,
    "beta_fast": NUMBER,
    "beta_slow": NUMBER,
    "truncate": FLAG,
    "mscale": NUMBER,
    "mscale_all_dim": NUMBER,
    "short_factor": Key(list, items=POSITIVE),  # this and the next three of type "longrope"
    "long_factor": Key(list, items=POSITIVE),
    "short_mscale": NUMBER,  # without effect: transformers reads attention_factor and factor
    "long_mscale": NUMBER,
    "finetuned": FLAG,  # without effect: whether the model was trained with the scaling
}
ROPE_KEYS = {
    "rope_parameters": Key(dict, keys=ROPE),
    "rope_scaling": Key(dict, keys=ROPE),
    "rope_theta": AT_LEAST_1,
    "partial_rotary_factor": NUMBER,
    "original_max_position_embeddings": POSITIONS,
    "rope_interleaved": OFF,
}

# The base model runs without dropout, in training too: a training says so where a file asks for it.
DROPOUT = """
    attention_dropout attention_probs_dropout_prob attn_pdrop dropout embd_pdrop embed_dropout embedding_dropout
    hidden_dropout hidden_dropout_prob resid_dropout resid_pdrop residual_dropout""".split()

WITHOUT_EFFECT = {
    "training: dropout, initial values, checkpointing, tensor parallelism": """
        classifier_dropout summary_dropout_prob summary_first_dropout summary_last_dropout
        initializer_factor initializer_range init_std gradient_checkpointing pretraining_tp
        model_parallel use_liger_kernel loss_type tp_plan""",
    "generation, and what a call of the model returns": """
        assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
        epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
        length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
        remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature
        top_k top_p typical_p use_cache
        output_attentions output_hidden_states output_past return_dict use_return_dict tie_last_hidden_states""",
    "classes and losses of transformers; the number of a head's outputs is read from its tensor": """
        id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params classifier_bias
        summary_activation summary_proj_to_labels summary_type summary_use_proj is_decoder""",
    "versions, names and precision": """
        _commit_hash _name_or_path name_or_path model_name base_model transformers_version transformers.js_config
        dtype torch_dtype _pre_quantization_dtype torchscript tf_legacy_loss use_bfloat16 unsloth_version unsloth_fixed
        is_llama_config license n_special predict_special_tokens""",
    # Code in the folder is never run: transformers runs it only with trust_remote_code.
    "which code computes the same": """
        auto_map custom_pipelines _attn_implementation _attn_implementation_autoset _attn_implementation_internal
        _experts_implementation _experts_implementation_internal _flash_attn_2_enabled attn_implementation
        use_flash_attention use_flash_attention_2 use_flash_attn chunk_size_feed_forward""",
    "the tokenizer has files of its own; lengths that only those read": """
        cls_token_id decoder_start_token_id end_token_id mask_token_id sep_token_id unk_token_id tokenizer_class prefix
        model_max_length max_sequence_length max_seq_len seq_length n_ctx tokenizer_model_max_length
        tokenizer_padding_side padding padding_side""",
}

COMMON = {name: Key() for names in WITHOUT_EFFECT.values() for name in names.split()} | {
    **dict.fromkeys(DROPOUT, NUMBER),
    "model_type": Key(str, required=True),
    "architectures": Key(list, items=Key(str)),  # `Family.read` says which
    "value_head_prefix": Key(str, only=tuple(HEADS)),  # OpenRLHF: the head's name
    "tie_word_embeddings": FLAG,
    "is_causal": Key(bool, only=(True,)),  # false: transformers makes a bidirectional mask, whatever the family
    "layer_types": Key(list, items=Key(str, only=("full_attention",))),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "tie_encoder_decoder": OFF,
    # OpenRLHF's statistics of the rewards: a caller may have them normalized (`rm.scoring.Scorer`).
    "mean": Key(float),
    "std": Key(float, minimum=1e-12),
    "normalize_reward": FLAG,  # OpenRLHF replaces it by its own flag whenever it loads a model
    # The tokenizer reads these where its own files name no token.
    "bos_token_id": Key((int, list), items=Key(int)),
    "eos_token_id": Key((int, list), items=Key(int)),
    "pad_token_id": Key((int, list), items=Key(int)),
}
