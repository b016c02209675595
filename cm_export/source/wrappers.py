"""Thin torch modules around a transformers model that say what one exported graph computes, through official seams.

    prefill : embeddings, positions, padding mask      -> last-token logits, keys and values of every layer
    decode  : new tokens' embeddings + past keys/values -> logits of each, keys and values with their rows added

The seams: `AttentionInterface` (which attention op is emitted), a duck-typed cache (only `update` is called), and the
decoder's own layers in our loop. The vision tower's module is the family's (families/__init__.py: Tower.module).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..families import Family
from . import layers

TEXT_ATTENTION = "cm_export_text"


def _attention(module, query, key, value, mask, scaling=None, **_):
    """One ai.onnx Attention-23 node: q [B,H,S,d], k and v [B,Hk,P,d], additive mask [B,1,S,P]."""
    return torch.onnx.ops.attention(query, key, value, mask, scale=scaling)[0].transpose(1, 2), None


AttentionInterface.register(TEXT_ATTENTION, _attention)


class _Rows:
    """What the attention modules see as a cache: past rows, then the new ones."""

    def __init__(self, past=None):
        self.past, self.rows = past, {}

    def update(self, key, value, layer, *_, **__):
        if self.past is not None:
            key = torch.cat([self.past[2 * layer], key], 2)
            value = torch.cat([self.past[2 * layer + 1], value], 2)
        self.rows[layer] = (key, value)
        return key, value

    def flat(self):
        return [x for layer in sorted(self.rows) for x in self.rows[layer]]


class Decoder(nn.Module):
    """The shared loop over a transformers decoder."""

    def __init__(self, model, family: Family):
        super().__init__()
        self.model, self.family = model, family
        model.get_decoder().config._attn_implementation = TEXT_ATTENTION

    @property
    def decoder(self):
        """Transformers' decoder, whose `layers` this loops over."""
        return self.model.get_decoder()

    @property
    def layers(self) -> int:
        """How many of them there are."""
        return len(self.decoder.layers)

    def differing(self, inputs: Mapping[str, Any]) -> int:
        """How many of the layers must be traced, the others being like the last of them (layers.py)."""
        rows, hidden = inputs.get("rows") or {}, inputs["inputs_embeds"]
        adds = (lambda i: self.family.mix_in(i, hidden, rows) is not hidden) if rows else (lambda _: False)
        return layers.enough(self.decoder.layers, adds)

    def run(self, hidden, position_ids, mask, past=None, rows=None):
        decoder, cache = self.decoder, _Rows(past)
        # M-RoPE reads several rows of positions, other models know no such axis.
        rope = decoder.rotary_emb(hidden, position_ids if position_ids.shape[0] > 1 else position_ids[0])
        for i, layer in enumerate(decoder.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=True)
            if rows:
                hidden = self.family.mix_in(i, hidden, rows)
        return hidden, cache.flat()

    def logits(self, hidden):
        return self.model.get_output_embeddings()(self.decoder.norm(hidden))


def _additive(allowed, dtype):
    """Boolean [.., S, P] -> additive mask [.., 1, S, P]: a large negative number where attention is not allowed."""
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


class Prefill(Decoder):
    """inputs_embeds [B,S,D], position_ids [A,B,S], attention_mask [B,S] -> logits [B,V], key/value [B,Hk,S,d] x L.

    `rows`: the tower's further outputs by name, [B,S,..], zero at text tokens.
    """

    def forward(self, inputs_embeds, position_ids, attention_mask, rows=None):
        row = torch.arange(inputs_embeds.shape[1])
        allowed = (row[None, :] <= row[:, None])[None] & (attention_mask[:, None, :] > 0)
        hidden, cache = self.run(inputs_embeds, position_ids, _additive(allowed, inputs_embeds.dtype), rows=rows)
        return (self.logits(hidden[:, -1:])[:, 0], *cache)


class Decode(Decoder):
    """inputs_embeds [B,N,D], position_ids [A,B,N], attention_mask [B,P+N], past -> logits [B,N,V], key/value [B,Hk,P+N,d].

    N is 1 when an answer is written, more when several tokens are read at once: drafted ones, or another question.
    """

    def forward(self, inputs_embeds, position_ids, attention_mask, past):
        row = torch.arange(attention_mask.shape[1])
        new = row[attention_mask.shape[1] - inputs_embeds.shape[1] :]
        allowed = (row[None, :] <= new[:, None])[None] & (attention_mask[:, None, :] > 0)
        hidden, cache = self.run(
            inputs_embeds, position_ids, _additive(allowed, inputs_embeds.dtype), list(past.values())
        )
        return (self.logits(hidden), *cache)
