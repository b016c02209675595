"""A Qwen2-VL bundle of given sizes with random weights, for speed only: what a step costs does not depend on what it says.

python benchmarks/random_bundle.py --out artifacts/mid.plan                          # 150 M parameters
python benchmarks/random_bundle.py --out artifacts/2b.plan --sizes qwen2-vl-2b       # 9 GB of memory, some minutes
python benchmarks/random_bundle.py --out artifacts/2b-int4.plan --sizes qwen2-vl-2b --weights int4
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cm_export.recipe.stored import PRECISIONS

# hidden, FFN, layers, query heads, key heads, vocabulary
SIZES = {"mid": (768, 4096, 12, 12, 2, 32000), "qwen2-vl-2b": (1536, 8960, 28, 12, 2, 151936)}


def checkpoint(folder: Path, sizes: str) -> Path:
    """Save a stock transformers checkpoint with a vision tower of one small layer, and a tokenizer, so that it can be asked."""
    import torch
    from peers.checkpoint import processor
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    hidden, ffn, layers, heads, kv_heads, vocab = SIZES[sizes]
    half = hidden // heads // 2
    folder.mkdir(parents=True, exist_ok=True)
    ids = processor(folder)
    text = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": hidden, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    named = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
    special = {name: ids[f"<|{token}|>"] for name, token in (named | {"vision_end_token_id": "vision_end"}).items()}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def nearest_codes(weight: Any, scheme: Any, name: str, inputs: Any = None) -> Any:
    """In the place of quant.choose.quantise: every weight to the nearest code, whatever is known of its inputs."""
    import numpy as np

    from cm_export.quant.rounding import nearest

    return nearest(np.pad(weight, ((0, -len(weight) % scheme.group), (0, 0))), scheme, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", choices=sorted(SIZES), default="mid")
    parser.add_argument("--weights", choices=PRECISIONS, default="fp32", help="in few bits, decode is `active`")
    parser.add_argument("--work-dir", type=Path, help="where the stages stay, for another build of the same model")
    args = parser.parse_args()
    from cm_export.build.build import build
    from cm_export.build.steps import packed
    from cm_export.recipe.recipe import Recipe

    neurons = "griffin" if args.weights == "fp32" else "active"  # a fixed set of neurons is gathered from float32 rows
    recipe = Recipe().replace(neurons__policy=neurons, tokens__cache="index", weights__precision=args.weights)
    packed.quantise = nearest_codes  # what is closer takes half an hour
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        path = checkpoint(Path(folder) / "checkpoint", args.sizes)
        build(str(path), args.out, recipe, work_dir=args.work_dir or Path(folder) / "stages")


if __name__ == "__main__":
    main()
