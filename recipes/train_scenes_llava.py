"""Train the model `scenes-llava`: the task of `scenes` on another architecture, a LLaVA with a CLIP tower and a Llama decoder.

    python recipes/train_scenes_llava.py --work WORK --out MODEL --steps 6000    # train, save, report
    python recipes/train_scenes_llava.py --work WORK --eval-only MODEL           # only the report

Questions, vocabulary, chat template and the way of teaching are those of `train_scenes.py`; the weights are its own
from the first step on. Before the decoder sees anything the tower learns to name what each image token shows.
What differs from `scenes`: image tokens of 8 x 8 pixels with learned positions and one token for the whole picture,
which the decoder is not shown; positions of one axis; a narrower decoder without biases.
"""

import math
import time

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from train_demo import END, IMAGE, TOKENS
from train_scenes import COLORS, COLUMNS, GRID, LAYERS, ROWS, SHAPES, Architecture, main
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cm_export.evals import scene as _scene

WIDTH, FFN = 192, 768
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 800, 32, 2e-3
PROCESSOR = {
    "preprocessor_config.json": dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="LlavaProcessor",
        size={"shortest_edge": _scene.SIZE},
        crop_size={"height": _scene.SIZE, "width": _scene.SIZE},
        do_resize=True,
        do_center_crop=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    ),
    "processor_config.json": dict(
        processor_class="LlavaProcessor",
        image_token=TOKENS[IMAGE],
        num_additional_image_tokens=1,
        patch_size=_scene.SIZE // GRID,
        vision_feature_select_strategy="default",
    ),
}


def see(model, pictures):
    """Image tokens [B,n,D] of uint8 pictures [B,H,W,3]."""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD])
    pixels = ((torch.as_tensor(pictures) / 255 - mean) / std).permute(0, 3, 1, 2)
    return torch.stack(model.model.get_image_features(pixels, return_dict=True).pooler_output)


def build():
    """6 decoder layers of width 192, 4 vision blocks of width 128; untrained."""
    ends = dict(bos_token_id=0, eos_token_id=END, pad_token_id=0)
    text = LlamaConfig(
        vocab_size=math.ceil(len(TOKENS) / 8) * 8,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        # Most frequency pairs of a head turn slowly: what a word means can be matched with what an image token shows
        # wherever both stand.
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        tie_word_embeddings=True,
        **ends,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=_scene.SIZE,
        patch_size=_scene.SIZE // GRID,
        projection_dim=128,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ends,
    )
    return LlavaForConditionalGeneration(config)


def new_model(args):
    """A LLaVA whose tower names what each image token shows, its row and its column; learnt once for every `--work`."""
    sizes = 1 + len(COLORS) * len(SHAPES), len(ROWS), len(COLUMNS)
    model, head = build(), nn.Linear(WIDTH, sum(sizes))
    parts, saved = nn.ModuleDict(dict(model=model, head=head)), args.work / "tower.safetensors"
    if saved.exists():
        load_model(parts, saved)
        return model
    model.set_attn_implementation("eager")
    weights = [*LLAVA.vision_parameters(model), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=TOWER_LR, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TOWER_LR, total_steps=TOWER_STEPS, pct_start=0.15)
    axis = torch.arange(GRID) * 3 // GRID
    row, column = (a.flatten().repeat(TOWER_BATCH) for a in torch.meshgrid(axis, axis, indexing="ij"))
    balance = torch.tensor([0.3] + [1.0] * len(COLORS) * len(SHAPES))  # most image tokens show the ground
    began, right = time.time(), []
    for step in range(TOWER_STEPS):
        scenes = [_scene.scene("train", n) for n in range(step * TOWER_BATCH, (step + 1) * TOWER_BATCH)]
        pictures = np.stack([np.asarray(_scene.draw(s)) for s in scenes])
        target = torch.tensor(np.stack([_scene.labels(s, GRID) for s in scenes])).flatten()
        with torch.autocast("cpu", torch.bfloat16):
            shown, *places = head(see(model, pictures)).float().flatten(0, 1).split(sizes, -1)
        optimizer.zero_grad()
        at = sum(F.cross_entropy(said, true) for said, true in zip(places, (row, column), strict=True))
        (F.cross_entropy(shown, target, weight=balance) + 0.3 * at).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        right.append((shown.argmax(-1) == target)[target > 0].float().mean().item())
        if step % 25 == 24:
            seen = f"named rightly {np.mean(right[-25:]):.4f}, places {at.item():.3f}"
            print(f"tower {step + 1} {time.time() - began:.0f} s, {seen}", flush=True)
    save_model(parts, str(saved))
    return model


TOWERS = ("vision_tower", "multi_modal_projector")
LLAVA = Architecture(LlavaForConditionalGeneration, CLIPImageProcessorPil, PROCESSOR, new_model, see, TOWERS, True)

if __name__ == "__main__":
    main(LLAVA, __doc__)
