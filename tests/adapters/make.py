"""Makes the files of this folder with PEFT: tiny models, adapters as PEFT saves them, and the weights as PEFT merges them.

    python tests/adapters/make.py          needs peft (written with 0.21.2), which nothing else here does

NAME.json: adapter_config.json      NAME.safetensors: base/..., adapter/..., merged/...
"""

import json
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "bias": "lora_only", "modules_to_save": ["lm_head"]},
    "dora": {"r": 2, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True, "bias": "all"},
    "patterns": {
        "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": [*TARGETS, "embed_tokens"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 1}, "alpha_pattern": {"down_proj": 3},
    },
    "layers": {  # a pattern for the modules, and lengths that rsLoRA scales
        "r": 2, "lora_alpha": 7, "use_dora": True, "use_rslora": True, "bias": "lora_only", "modules_to_save": ["norm"],
        "target_modules": r".*layers\.\d+\.(self_attn\.[qk]_proj|mlp\.down_proj)", "alpha_pattern": {"k_proj": 0},
        "exclude_modules": r".*\.0\.self_attn\.q_proj",
    },
    "one_layer": {
        "r": 3, "lora_alpha": -2, "target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [1], "lora_bias": True,
        "exclude_modules": ["layers.1.self_attn.k_proj"],
    },
}  # fmt: skip


def main() -> None:
    for case, settings in CASES.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"vocab_size": 11, "num_hidden_layers": 2, "tie_word_embeddings": False}
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) / 2)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            saved = load_file(Path(folder) / "adapter_model.safetensors")
        merged = dict(adapted.merge_and_unload().named_parameters())
        assert set(merged) == set(base)
        parts = {"base": base, "adapter": saved, "merged": merged}
        held = {f"{part}/{n}": t.detach().contiguous().clone() for part, of in parts.items() for n, t in of.items()}
        save_file(held, HERE / f"{case}.safetensors")
        (HERE / f"{case}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
