"""A family that is not part of the package: ViP-LLaVA (`model_type = vipllava`), CLIP tower, projector outside it, plain rope.

    picture -> square of S x S pixels -> (S / p)^2 image tokens, always as many      no grid is chosen, nothing is merged

Source: ViP-LLaVA (arXiv 2312.00784), section 3.
"""

from __future__ import annotations

import random

import numpy as np

from cm_export.families import (
    Family,
    Layout,
    Picture,
    Port,
    Tower,
    check_decoder,
    check_image_token,
    decoder_shape,
    embeds,
    find,
)

IMAGES = "images"


class VipLlava(Family):
    model_class = "VipLlavaForConditionalGeneration"
    layer = "model.language_model.layers.{layer}."
    embedding = "model.language_model.embed_tokens.weight"

    def shape(self, config):
        text = config["text_config"]
        return decoder_shape(text, text.get("head_dim"), sees=True, image_token=config["image_token_index"])

    def check_config(self, config):
        text = config["text_config"]
        check_decoder(text, text.get("head_dim"))
        check_image_token(config["image_token_index"], text)

    def tower(self, config):
        return ClipTower(config)

    def sample(self, seed):
        r, text = random.Random(seed), find("llama").sample(seed)
        heads, patch, side = r.choice([1, 2]), r.choice([2, 4]), r.choice([2, 3, 4])
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": heads * r.choice([8, 16]),
            "intermediate_size": 32,
            "num_hidden_layers": r.choice([2, 3]),
            "num_attention_heads": heads,
            "image_size": patch * side,
            "patch_size": patch,
            "projection_dim": 16,
        }
        found = {"model_type": "vipllava", "text_config": text, "vision_config": vision, "image_token_index": 5}
        found |= {"vision_feature_layer": r.choice([-1, -2]), "tie_word_embeddings": text["tie_word_embeddings"]}
        return found


class ClipTower(Tower):
    """Pictures of one size; attention among all patches of a picture; the features of a layer before the last."""

    prefixes = ("model.vision_tower.", "model.multi_modal_projector.")

    def __init__(self, config):
        vision = config["vision_config"]
        self.size, self.patch, self.heads = vision["image_size"], vision["patch_size"], vision["num_attention_heads"]
        self.width, self.hidden = vision["hidden_size"], config["text_config"]["hidden_size"]
        layers, chosen = vision["num_hidden_layers"], config["vision_feature_layer"]
        self.layers = chosen if chosen >= 0 else layers + 1 + chosen  # that run
        self.side = self.size // self.patch
        self.min_side = 1
        self.inputs = (Port("pixel_values", np.float32, (IMAGES, 3, self.size, self.size)),)
        self.outputs = (embeds(self.hidden),)

    def module(self, model):
        from torch import nn

        layers = self.layers

        class Vision(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model
                for module in model.model.vision_tower.modules():
                    if hasattr(module, "config"):
                        module.config._attn_implementation = "eager"

            def forward(self, pixel_values):
                tower = self.model.model.vision_tower
                hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
                for layer in tower.encoder.layers[:layers]:
                    hidden = layer(hidden, None)
                return (self.model.model.multi_modal_projector(hidden[:, 1:]).flatten(0, 1),)

        return Vision()

    def features(self, model, given):
        import torch

        found = model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)
        return {"image_embeds": torch.cat(tuple(found.pooler_output))}

    def stock(self, pictures, is_image):
        return self.feeds(pictures)

    def feeds(self, pictures):
        return {"pixel_values": np.concatenate([p.pixels for p in pictures])}

    def rule(self, processor):
        return processor.get("image_mean", [0.5] * 3), processor.get("image_std", [0.5] * 3)

    def picture(self, image, rule):
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in rule)
        pixels = np.asarray(image.resize((self.size, self.size)), np.float32).transpose(2, 0, 1) / 255
        return self._picture(((pixels - mean) / std)[None])

    def _picture(self, pixels):
        return Picture(np.ascontiguousarray(pixels, np.float32), Layout((1, self.side, self.side)))

    def probes(self, rng):
        smooth = np.sin(np.linspace(0, 9, 3 * self.size**2)).reshape(1, 3, self.size, self.size)
        return [self._picture(smooth + 0.3 * rng.standard_normal(smooth.shape)) for _ in range(2)]

    def sized(self, tokens, rng):
        from cm_export.base.errors import InputError

        count, rest = divmod(tokens, self.side**2)
        if rest:
            fix = f"give a multiple of {self.side**2}"
            raise InputError(f"{tokens} image tokens are no whole pictures", where="--image-tokens", fix=fix)
        return [self._picture(rng.standard_normal((1, 3, self.size, self.size))) for _ in range(count)]

    def memory(self, picture):
        return 4 * self.heads * (self.side**2 + 1) ** 2

    def engine_memory(self, patches, fused):
        tokens = self.side**2 + 1
        return (0 if fused else 4 * self.heads * tokens**2) + 24 * tokens * self.width

    def axis_ranges(self, patches):
        return {IMAGES: (1, 1, 1)}


FAMILY = VipLlava()
