"""Model types that are refused, with the reason: what stands in the way of each is a part of the decoder, not its name.

mixtral  ->  "a mixture of experts: ..."        docs/families.md has the same list

A model type that is in no list is unknown, which the caller says in its own words.
"""

from dataclasses import dataclass

PAGE = "docs/families.md"


@dataclass(frozen=True)
class Reason:
    """What a decoder has that the graphs here cannot hold, and the model types that have it."""

    what: str
    why: str
    types: tuple[str, ...]


REASONS = (
    Reason(
        "sliding windows",
        "layers see only the last few thousand tokens, and the cache of the graphs here keeps one length for all layers",
        (
            "mistral", "ministral", "mistral3", "pixtral", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text",
            "cohere2", "cohere2_vision", "starcoder2", "exaone4", "paligemma",
        ),
    ),
    Reason(
        "a recurrent state",
        "layers keep a state in the place of keys and values, so no token can leave the cache",
        (
            "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma", "rwkv",
            "qwen3_next", "qwen3_5", "lfm2", "lfm2_vl", "granitemoehybrid", "nemotron_h", "kimi_linear",
        ),
    ),
    Reason(
        "a mixture of experts",
        "every token chooses its own FFNs, and CoreFFN holds one gate, up and down matrix per layer",
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe", "deepseek_v2", "deepseek_v3",
            "deepseek_vl_v2", "olmoe", "phimoe", "llama4", "gpt_oss", "glm4_moe", "glm4v_moe", "kimi_vl", "aria", "dbrx",
            "ernie4_5_moe", "ernie4_5_vl_moe", "granitemoe", "hunyuan_v1_moe", "minimax",
        ),
    ),
    Reason(
        "an encoder and a decoder",
        "answers read a second cache that an encoder wrote, and there is no graph for it",
        (
            "t5", "mt5", "umt5", "bart", "mbart", "t5gemma", "florence2", "pix2struct", "vision-encoder-decoder", "whisper",
            "blip", "instructblip", "kosmos-2",
        ),
    ),
    Reason(
        "cross-attention to the picture",
        "pictures are no tokens of the prompt there, so there is none to keep or to cut",
        ("mllama", "mllama_text_model", "idefics"),
    ),
    Reason(
        "fused projections",
        "gate and up (gate_up_proj) or q, k and v are one weight, and the sites are found by a weight for each",
        ("phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "gpt_bigcode", "mpt", "internlm2"),
    ),
    Reason(
        "an FFN without a gate",
        "CoreFFN computes down(act(gate(x)) * up(x))",
        ("gpt2", "opt", "bloom", "gpt_neox", "gptj", "gpt_neo", "phi", "falcon", "blip-2", "nemotron", "persimmon", "fuyu"),
    ),
)  # fmt: skip


def why_not(model_type: object) -> str | None:
    """Why a model type is refused: "has sliding windows: ..."; None for one of which nothing is known here."""
    found = next((reason for reason in REASONS if model_type in reason.types), None)
    return f"has {found.what}: {found.why}" if found else None
