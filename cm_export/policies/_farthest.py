"""Farthest-point order: each next token is the one most unlike all those taken before it, the same in torch and in ONNX.

    first: least like the picture as a whole        then: argmax over t of min over taken c of (1 - cos(x_t, x_c))

A token's score is that distance when it was taken, so scores fall in the order of taking, and the best n by score are
the first n taken (ties: the lower position). Cosines in float64, distances rounded to whole 2^-30: no runtime differs.
"""

from __future__ import annotations

from ._direction import UNIT, alike, alike_text, unit, unit_text
from ._torch import torch

_FARTHEST = int(2 * UNIT)  # no distance is larger; also the score of the first
_FIRST = 2 * _FARTHEST  # before any is taken, above every distance: how unlike the picture a token is


def farthest(x: torch.Tensor, image_mask: torch.Tensor, relevance: torch.Tensor | None = None) -> torch.Tensor:
    """[B,S] int64 in 0..2^31, 0 for text; x [B,S,N] float32, image_mask [B,S] bool.

    relevance [B,S] float64 in 0..1: distances are multiplied by it, and the first token is the most relevant one.
    """
    prompt = x.shape[1]
    tie_break = prompt - 1 - torch.arange(prompt, device=x.device)
    directions = unit(x)
    cosine = directions @ directions.mT
    worth = torch.ones_like(cosine[..., 0]) if relevance is None else relevance
    unlike = 1.0 - alike(x, image_mask.float()) if relevance is None else relevance
    nearest = _FIRST + _whole(unlike)
    score = torch.zeros_like(nearest)
    left = image_mask
    for _ in range(int(image_mask.sum(1).max())):
        key = torch.where(left, nearest * prompt + tie_break, -1)
        best = key.amax(1, keepdim=True)
        taken = (key == best) & left
        score = torch.where(taken, nearest.clamp_max(_FARTHEST), score)
        left = left & ~taken
        place = prompt - 1 - best.clamp_min(0) % prompt
        row = cosine.gather(1, place[..., None].expand(-1, -1, prompt)).squeeze(1)
        nearest = torch.minimum(nearest, _whole((1.0 - row).clamp_min(0.0) * worth))
    return score


def _whole(distance: torch.Tensor) -> torch.Tensor:
    return torch.floor(distance.clamp_min(0.0) * UNIT + 0.5).long()


def farthest_text(out: str, x: str, relevance: str | None = None) -> str:
    """The nodes that compute `out` = farthest(x, image_mask): a Loop, one round for each token that is taken."""
    unlike = f"""
        far_image_number = Cast <to = 1> (image_mask)
        {alike_text("far_like", x, "far_image_number")}
        far_first_worth = Sub (far_unit_distance, far_like)"""
    if relevance is not None:
        unlike = f"\n        far_first_worth = Identity ({relevance})"
    return f"""
        far_no_row = Constant <value_int = 0> ()
        far_one_row = Constant <value_int = 1> ()
        far_no_key = Constant <value_int = -1> ()
        far_axis_0 = Constant <value_ints = [0]> ()
        far_axis_1 = Constant <value_ints = [1]> ()
        far_no_distance = Constant <value = double {{0.0}}> ()
        far_unit_distance = Constant <value = double {{1.0}}> ()
        far_half = Constant <value = double {{0.5}}> ()
        far_scale = Constant <value = double {{{UNIT}}}> ()
        far_above = Constant <value_int = {_FIRST}> ()
        far_limit = Constant <value_int = {_FARTHEST}> ()
        far_prompt = Shape <start = 1> (image_mask)
        far_size = Squeeze (far_prompt)
        far_last = Sub (far_size, far_one_row)
        far_position = Range (far_no_row, far_size, far_one_row)
        far_tie_break = Sub (far_last, far_position)
        {unit_text("far_directions", x)}
        far_turned = Transpose <perm = [0, 2, 1]> (far_directions)
        far_cosine = MatMul (far_directions, far_turned)
        {unlike}
        far_unlike_positive = Max (far_first_worth, far_no_distance)
        far_unlike_fine = Mul (far_unlike_positive, far_scale)
        far_unlike_raised = Add (far_unlike_fine, far_half)
        far_unlike_floor = Floor (far_unlike_raised)
        far_unlike_whole = Cast <to = 7> (far_unlike_floor)
        far_nearest_0 = Add (far_unlike_whole, far_above)
        far_score_0 = Mul (far_nearest_0, far_no_row)
        far_image64 = Cast <to = 7> (image_mask)
        far_images = ReduceSum <keepdims = 0> (far_image64, far_axis_1)
        far_rounds_1 = ReduceMax <keepdims = 1> (far_images, far_axis_0)
        far_rounds = Squeeze (far_rounds_1)
        far_always = Constant <value = bool {{1}}> ()
        {out}_nearest, {out}_left, {out} = Loop (far_rounds, far_always, far_nearest_0, image_mask, far_score_0) <body = take (
            int64 far_number, bool far_going, int64[B,S] far_nearest, bool[B,S] far_left, int64[B,S] far_score
        ) => (bool far_going_on, int64[B,S] far_nearest_next, bool[B,S] far_left_next, int64[B,S] far_score_next) {{
            far_scaled = Mul (far_nearest, far_size)
            far_unique = Add (far_scaled, far_tie_break)
            far_key = Where (far_left, far_unique, far_no_key)
            far_best = ReduceMax <keepdims = 1> (far_key, far_axis_1)
            far_is_best = Equal (far_key, far_best)
            far_taken = And (far_is_best, far_left)
            far_bounded = Min (far_nearest, far_limit)
            far_score_next = Where (far_taken, far_bounded, far_score)
            far_others = Not (far_taken)
            far_left_next = And (far_left, far_others)
            far_best_real = Max (far_best, far_no_row)
            far_best_tie = Mod (far_best_real, far_size)
            far_place = Sub (far_last, far_best_tie)
            far_row = GatherND <batch_dims = 1> (far_cosine, far_place)
            far_distance = Sub (far_unit_distance, far_row)
            far_positive = Max (far_distance, far_no_distance)
            far_worth = {"Identity (far_positive)" if relevance is None else f"Mul (far_positive, {relevance})"}
            far_fine = Mul (far_worth, far_scale)
            far_raised = Add (far_fine, far_half)
            far_down = Floor (far_raised)
            far_whole = Cast <to = 7> (far_down)
            far_nearest_next = Min (far_nearest, far_whole)
            # ends as soon as nothing is left, so that a runtime which needs a constant bound may take a larger one
            far_left_number = Cast <to = 6> (far_left_next)
            far_left_any = ReduceMax <keepdims = 0> (far_left_number)
            far_going_on = Cast <to = 9> (far_left_any)
        }}>"""
