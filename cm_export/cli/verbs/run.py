"""`cm-export run`: ask a bundle about pictures; the answer streams to stdout as it is decoded."""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click

from ...base.errors import InputError
from ...base.paths import check_apart
from ..console import (
    Count,
    Verb,
    backend_option,
    bundle_argument,
    control_tokens_option,
    device_option,
    emit_json,
    json_option,
    progress,
    quiet_option,
    seed_option,
    threads_option,
)
from ..recipe_options import recipe_option
from ..sampling_options import asked, sampling_options
from ..summary import summary


@click.command(
    cls=Verb,
    short_help="Ask a bundle about pictures.",
    examples=(
        'cm-export run demo.plan --image scene.png --prompt "what shape is it ?"',
        'cm-export run engine.plan --image a.jpg --image b.jpg --prompt "What changed?" --token-share 0.25',
        'cm-export run engine.plan --image a.jpg --prompt "Describe it." --overlay kept.png --json',
        'cm-export run engine.plan --image a.jpg --prompt "Describe it." --dense',
        'cm-export run engine.plan --image a.jpg --prompt "Describe it." --guard',
        'cm-export run engine.plan --image a.jpg --prompt "What is it?" --prompt "Which colour does it have?"',
        'cm-export run engine.plan --video clip.mp4 --fps 1 --prompt "What happens?"',
        'cm-export run engine.plan --image a.jpg --prompt "Write a poem." --temperature 0.8 --top-p 0.9 --seed 7',
    ),
)
@bundle_argument
@click.option(
    "--image", "-i", "paths", multiple=True, help="A picture, or - for standard input; repeat it for several."
)
@click.option(
    "--video", "clips", multiple=True, help="A clip such as clip.mp4, after the pictures; repeat it for several."
)
@click.option("--fps", type=float, help="Frames of a clip that are read per second.  [default: as the checkpoint says]")
@click.option("--frames", type=Count(1), help="Frames of a clip that are read.  [default: as the checkpoint says]")
@click.option("--prompt", "-p", "prompts", multiple=True, help="The question; repeat it to ask another one afterwards.")
@click.option("--chat", is_flag=True, help="Then ask the questions on stdin, one a line, until it ends.")
@click.option("--system", help="System message.  [default: the chat template's]")
@click.option("--max-new-tokens", type=Count(1), default=128, show_default=True, help="Longest answer.")
@click.option("--dense", is_flag=True, help="Compute all neurons and all tokens, to compare with.")
@recipe_option("--neuron-share")
@recipe_option("--token-share")
@click.option("--guard", is_flag=True, help="Draft sparsely, check each draft with the dense model, give its answer.")
@click.option("--guard-every", type=Count(2), default=16, show_default=True, help="Tokens of a draft, with --guard.")
@sampling_options
@click.option("--overlay", help="Write a picture of the image tokens that were kept (.png, .jpg, .webp).")
@control_tokens_option
@seed_option
@backend_option
@device_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, paths: tuple[str, ...], clips: tuple[str, ...], fps: float | None, frames: int | None,
    prompts: tuple[str, ...], chat: bool, system: str | None,
    max_new_tokens: int, dense: bool, neuron_share: float | None, token_share: float | None, guard: bool,
    guard_every: int, overlay: str | None, control_tokens: bool, seed: int | None, backend: str | None, device: str | None,
    threads: int, as_json: bool, quiet: bool, **choices: Any,
) -> None:  # fmt: skip
    """Ask a bundle about pictures; the answer streams to stdout, one summary line goes to stderr."""
    if not (prompts or chat):
        raise click.UsageError("Missing option '--prompt' / '-p'.", click.get_current_context())
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty", where="--prompt", fix='ask something, such as "Describe the picture."')
    if dense and (neuron_share or token_share):
        raise InputError("--dense means all neurons and all tokens", fix="leave --neuron-share and --token-share out")
    if dense and guard:
        raise InputError("--dense needs no guard", fix="leave --guard out")
    if (fps is not None or frames is not None) and not clips:
        raise InputError("there is no clip to take frames from", where="--fps, --frames", fix="give --video")
    if overlay is not None and not (paths or clips):
        raise InputError("there is no picture to draw on", where="--overlay", fix="give --image")
    if overlay is not None and chat:
        raise InputError("--overlay draws for questions that are known", fix="ask them with --prompt instead of --chat")

    if chat and "-" in paths:
        raise InputError("standard input cannot hold the picture and the questions of --chat", where="--image -",
                         fix="give the picture's path, or ask with --prompt")  # fmt: skip

    from ...host.images import check_size

    sampling = asked(choices, seed)
    images = _opened(paths)
    drawings = [] if overlay is None else _drawings(overlay, len(images) + len(clips), len(prompts))
    for drawing in drawings:
        check_apart(drawing, (*(picture.name for picture in images), *clips))

    from ...host.loaded import load

    with progress(quiet or as_json) as step:
        model = load(bundle, threads=threads, progress=step, backend=backend, device=device)
    images += [model.clip(path, rate=fps, count=frames) for path in clips]
    for picture in images:
        check_size(picture.image, model.tower.min_side, model.tower.max_ratio, where=picture.name)
    several = chat or len(prompts) > 1
    if several:
        ask = model.conversation(images, system, dense, neuron_share, token_share, seed, control_tokens, sampling).ask
    else:
        ask = partial(
            model.generate, images=images, system=system, dense=dense, neuron_share=neuron_share,
            token_share=token_share, seed=seed, control_tokens=control_tokens, sampling=sampling,
        )  # fmt: skip
    turns, first = [], None
    for number, prompt in enumerate(chain(prompts, _questions() if chat else ())):
        every, on_text = guard_every if guard else None, None if as_json else _write
        answer = ask(prompt, max_new_tokens=max_new_tokens, guard=every, on_text=on_text)
        here = drawings[number * len(images) : (number + 1) * len(images)]
        if here:
            from ...host.overlay import draw_overlay

            for drawing, picture, kept in zip(here, images, answer.kept, strict=True):
                caption = f"image tokens kept in {int(kept.sum())} of {kept.size} cells\n{prompt}"
                draw_overlay(picture.image, kept, drawing, caption)
        turn = {"text": answer.text, "token_ids": answer.token_ids, **answer.stats}
        turn |= {"notes": answer.notes, "overlays": here}
        first = first or answer.stats
        if as_json:
            turns.append({"prompt": prompt, **turn} if several else turn)
            continue
        print(flush=True)  # ends the streamed line
        for line in [] if quiet else [*answer.notes, summary(answer.stats, first)]:
            print(f"cm-export: {line}", file=sys.stderr)
    if as_json:
        emit_json({"turns": turns} if several else turns[0])


def _opened(paths: tuple[str, ...]) -> list[Any]:
    """The pictures of --image; - is standard input."""
    from ...host.images import opened, opened_standard_input

    if paths.count("-") > 1:
        raise InputError("standard input holds one picture", where="--image -", fix="give - once, and paths for others")
    return [opened_standard_input() if path == "-" else opened(path) for path in paths]


def _questions() -> Iterator[str]:
    """Lines of stdin that are not empty, until it ends; a terminal shows a prompt."""
    if sys.stdin is None:
        raise InputError("there is no stdin to read questions from", where="--chat", fix="ask with --prompt")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if question := line.removeprefix("\ufeff").strip():  # a file from Windows may begin with that mark
            yield question


def _drawings(overlay: str, images: int, questions: int) -> list[Path]:
    """Where the drawings go, question by question: kept.png; kept-1.png ... of several pictures; kept-q1.png ... of
    several questions."""
    from ...host.overlay import check_output

    path = check_output(overlay)
    asked = [f"-q{number}" for number in range(1, questions + 1)] if questions > 1 else [""]
    shown = [f"-{number}" for number in range(1, images + 1)] if images > 1 else [""]
    return [check_output(path.with_name(f"{path.stem}{q}{i}{path.suffix}")) for q in asked for i in shown]


def _write(text: str) -> None:
    print(text, end="", flush=True)
