"""Random configurations of SmolVLM, Idefics3 and InternVL, the sizes of published checkpoints, and their chat templates."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from random_models import IMAGE, random_checkpoint

from cm_export import families


def sized(name: str, config: dict[str, Any], tile: int, patch: int, merge: int) -> dict[str, Any]:
    """The same with tiles of these sizes."""
    internvl = name == "internvl"
    vision = {"image_size": [tile] * 2 if internvl else tile, "patch_size": [patch] * 2 if internvl else patch}
    merging = {"downsample_ratio": 1 / merge} if internvl else {"scale_factor": merge}
    return config | merging | {"vision_config": config["vision_config"] | vision}


RANDOM = {name: families.find(name).sample for name in ("smolvlm", "idefics3", "internvl")}

# ---------------------------------------------------------------- processors
# Chat templates as the published checkpoints have them.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_ROWS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
_MARKS = ["<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>"]
_SMOLVLM = ["<pad>", *_MARKS, "<image>", "<global-img>", *_ROWS]  # <image> has the id IMAGE
_INTERNVL = ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
_NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
# (control tokens, template, class of the processor, how it calls the number of image tokens of a tile)
PROCESSORS = {
    "smolvlm": (_SMOLVLM, SMOLVLM_TEMPLATE, "SmolVLMProcessor", "image_seq_len"),
    "idefics3": (_SMOLVLM[:6], SMOLVLM_TEMPLATE, "Idefics3Processor", "image_seq_len"),  # rows and columns are words
    "internvl": (_INTERNVL, INTERNVL_TEMPLATE, "InternVLProcessor", "image_seq_length"),
}
_TRAINED_ON = (
    "what shape is red? describe this picture.\n\nUser: Assistant: a line\n\nand another\n user system assistant"
)


def rule_of(name: str, tile: int, **more: Any) -> dict[str, Any]:
    """A preprocessor_config.json as the published ones, with tiles of this many pixels."""
    if name == "internvl":
        found = {"size": {"height": tile, "width": tile}, "min_patches": 1, "max_patches": 12, "crop_to_patches": False}
        found |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
        return (
            found | {"image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor"} | more
        )
    kind = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[name]
    found = {
        "size": {"longest_edge": 4 * tile},
        "max_image_size": {"longest_edge": tile},
        "resample": 1,
        "do_pad": True,
    }
    found |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_image_splitting": True, "rescale_factor": 1 / 255}
    return found | {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"} | more


def write_processor(name: str, folder: Path, tile: int, tokens: int, **rule: Any) -> int:
    """Tokenizer, template and picture rule of a checkpoint with `tokens` image tokens a tile; returns the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special, template, kind, count = PROCESSORS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TRAINED_ON] * 5, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"extra_special_tokens": _NAMED | {"video_token": "<video>"}} if name == "internvl" else {}
    stop = special.index("<|im_end|>" if name == "internvl" else "<end_of_utterance>")
    files = {
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", **named},
        "preprocessor_config": rule_of(name, tile, **rule),
        "processor_config": {"processor_class": kind, count: tokens},
        "generation_config": {"eos_token_id": stop, "pad_token_id": 0},
    }
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab_size()


def processor_of(name: str, folder: Path) -> Any:
    """transformers' own processor of such a folder, without the parts for videos, which need further packages."""
    import transformers
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    pil = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}.get(
        name, GotOcr2ImageProcessorPil
    )
    _, template, kind, count = PROCESSORS[name]
    tokens = json.loads((folder / "processor_config.json").read_text())[count]
    with pytest.MonkeyPatch.context() as patch:
        real = transformers.ProcessorMixin.check_argument_for_proper_class
        patch.setattr(processing_smolvlm, "num2words", str)
        check = lambda self, name, given: name != "video_processor" and real(self, name, given)  # noqa: E731
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", check)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        parts = {} if name == "idefics3" else {"video_processor": SimpleNamespace(num_frames=1, fps=1)}
        kwargs = {"image_processor": pil.from_pretrained(folder), "tokenizer": tokenizer, "chat_template": template}
        return getattr(transformers, kind)(**kwargs, **parts, **{count: tokens})


def asked_of(processor: Any, images: list[Any], question: str, system: str | None = None) -> Any:
    """What transformers' processor makes of pictures and a question: input_ids, pixel_values, ..."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    blocks = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    messages.append({"role": "user", "content": blocks})
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **how)


TILE, PATCH, MERGE = 28, 7, 2  # of checkpoints that take questions: 2 x 2 image tokens a tile


def answering(name: str, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint that takes questions; widths that can be packed in 4 bits."""
    vocab = write_processor(name, folder, TILE, (TILE // PATCH // MERGE) ** 2)
    config = sized(name, RANDOM[name](5), TILE, PATCH, MERGE)
    config["text_config"] |= {
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "num_hidden_layers": 2, "head_dim": 16,
    }  # fmt: skip
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return random_checkpoint(config, folder, seed)


# ---------------------------------------------------------------- published checkpoints
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
_INTERNVIT = {
    "attention_bias": True, "hidden_act": "gelu", "hidden_size": 1024, "image_size": [448, 448], "intermediate_size": 4096,
    "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm",
    "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": [14, 14], "use_qk_norm": False,
    "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
}  # fmt: skip


def _internvl(**text: Any) -> dict[str, Any]:
    shared = {
        "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151674,
    }  # fmt: skip
    found = {"model_type": "internvl", "downsample_ratio": 0.5, "image_seq_length": 256, "image_token_id": 151667}
    found |= {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return found | {"vision_config": _INTERNVIT, "text_config": shared | text}


# config.json of published checkpoints, as far as it says sizes, and their weights of a decoded token in 10^9.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 3, "tie_word_embeddings": False,
         "vision_config": _SIGLIP | {"model_type": "smolvlm_vision", "image_size": 384},
         "text_config": {"model_type": "llama", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
                         "max_position_embeddings": 8192, "num_hidden_layers": 24, "rms_norm_eps": 1e-5,
                         "rope_theta": 130000, "vocab_size": 49280}},
        1.7115,
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (
        {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False,
         "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768, "image_size": 512,
                           "num_attention_heads": 12, "patch_size": 16},
         "text_config": {"model_type": "llama", "head_dim": 64, "hidden_size": 960, "intermediate_size": 2560,
                         "max_position_embeddings": 8192, "num_attention_heads": 15, "num_hidden_layers": 32,
                         "num_key_value_heads": 5, "rms_norm_eps": 1e-5, "rope_theta": 100000, "vocab_size": 49280}},
        0.3619,
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": (
        {"model_type": "idefics3", "image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False,
         "vision_config": _SIGLIP | {"model_type": "idefics3", "image_size": 364},
         "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128259,
                         "eos_token_id": [128001, 128008, 128009],
                         "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}}},
        7.5047,
    ),
    "OpenGVLab/InternVL3-1B-hf": (
        _internvl(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_hidden_layers=24), 0.4937,
    ),
    "OpenGVLab/InternVL3-2B-hf": (
        _internvl(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_hidden_layers=28), 1.5432,
    ),
}  # fmt: skip


def published(name: str, small: bool = False) -> dict[str, Any]:
    """A published config.json; `small`: two layers each of tower and decoder, and a small vocabulary."""
    config = copy.deepcopy(PUBLISHED[name][0])
    if small:
        config["text_config"] |= {"num_hidden_layers": 2, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 2}
        config["vision_config"] |= {"num_hidden_layers": 2}
        config |= {"image_token_id": IMAGE, "pad_token_id": 0}
    return config
