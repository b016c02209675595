"""What a checkpoint's generation_config.json asks of answers: what the bundle's runner does, and what it does not.

{"do_sample": true, "repetition_penalty": 1.05, "top_k": 1, "num_beams": 4}
    settings   {"repetition_penalty": 1.05, "top_k": 1}        into the manifest; host/sampling.py reads them
    notes      "num_beams = 4 is not used", ...                printed by the build, and in the manifest

As in transformers, a checkpoint without that file may have such settings in config.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.json_file import read_object
from ..host.sampling import fault

FILE = "generation_config.json"
# Those that change greedy answers; a value that means nothing is refused.
_GREEDY = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_new_tokens", "stop_strings": "stop"}
# Those of sampling, which is done where a user asks for it; a value that means nothing is only told.
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
# What transformers does and this program does not, with the values that change nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "max_new_tokens": (),
    "max_length": (20,),  # transformers' own default, which older versions wrote into the file
    "min_length": (0,),
    "max_time": (),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
# Read elsewhere (eos_token_id), or without a say in which tokens come.
_MOOT = {
    "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "renormalize_logits", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "early_stopping",
    "length_penalty", "is_assistant", "use_mtp", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
}  # fmt: skip
_WHY = {
    "max_new_tokens": "the longest answer is what --max-new-tokens says",
    "max_length": "the longest answer is what --max-new-tokens says",
    "min_length": "min_new_tokens, which does not count the prompt, is known",
}


@dataclass(frozen=True)
class Generation:
    """Settings of answers as `host.sampling.settle` reads them, and sentences about those that are not used."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def read(path: Path, config: dict[str, Any]) -> Generation:
    """The settings of the checkpoint at `path`, whose config.json holds `config`. Raises InputError."""
    file = path / FILE
    values = read_object(file) if file.is_file() else _legacy(config)
    return _sorted_out(values, file if file.is_file() else path / "config.json")


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    """Settings in config.json, where transformers looks for them without the file: outside, then among the decoder's."""
    known, text = {*_GREEDY, *_SAMPLED, *_UNUSED, "do_sample"}, config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return {n: v for part in (inner, config) for n, v in part.items() if n in known and v is not None}


def _sorted_out(values: dict[str, Any], file: Path) -> Generation:
    settings, notes = {}, []
    for name, value in values.items():
        if value is None or name in _MOOT or name.startswith("_"):
            continue
        if name in _GREEDY:
            value = [value] if name == "stop_strings" and isinstance(value, str) else value
            wrong = (
                "is not text" if name == "stop_strings" and not isinstance(value, list) else fault(_GREEDY[name], value)
            )
            if wrong:
                raise InputError(f"{name}: {value!r} {wrong}", where=file, fix="mend it, or remove it")
            settings[_GREEDY[name]] = value
        elif name in _SAMPLED:
            wrong = fault(name, value)
            if wrong:
                notes.append(f"{name} = {value!r} {wrong}, and is not used")
            else:
                settings[name] = value
        elif name not in _UNUSED:
            notes.append(f"{name} is no setting that is known here, and is not used")
        elif value not in (*_UNUSED[name], [], {}):
            notes.append(f"{name} = {value!r} is not used" + (f": {_WHY[name]}" if name in _WHY else ""))
    if values.get("do_sample"):
        drawn = ", ".join(f"{n} {settings[n]:g}" for n in _SAMPLED if n in settings)
        drawn = f", with {drawn}" if drawn else ""
        notes.append(f"do_sample = true: answers are greedy all the same; `run --sample` draws them{drawn}")
    return Generation(settings, tuple(f"{file.name}: {note}" for note in notes))
