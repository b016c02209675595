"""`cm-export client`: ask a server, `cm-export serve` or Triton; the answer streams to stdout."""

import sys
import time
from typing import Any

import click

from ...base.errors import InputError
from ..console import Count, Share, Verb, emit_json, json_option, quiet_option
from ..summary import summary

_FIELDS = ("max_tokens", "token_share", "neuron_share", "temperature", "top_p", "top_k", "seed", "deadline")


@click.command(
    cls=Verb,
    short_help="Ask a server about pictures.",
    examples=(
        'cm-export client --image scene.png --prompt "what shape is it ?"',
        'cm-export client --url http://gpu-box:8000 --image a.jpg --prompt "Describe it." --token-share 0.25 --json',
        'cm-export client --url https://example.org --api-key KEY --prompt "Hello" --temperature 0.8 --seed 7',
    ),
)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True,
              help="Where it listens: a server in OpenAI's form, or Triton's HTTP port.")  # fmt: skip
@click.option(
    "--image", "-i", "paths", multiple=True, help="A picture, or - for standard input; repeat it for several."
)
@click.option("--prompt", "-p", "prompt", required=True, help="The question.")
@click.option("--system", help="System message.  [default: the chat template's]")
@click.option("--model", help="Which model of the server.  [default: its first; vlm on Triton]")
@click.option(
    "--api-key", envvar="CM_EXPORT_API_KEY", metavar="KEY", help="The server's key; or set CM_EXPORT_API_KEY."
)
@click.option("--max-tokens", type=Count(1), help="Longest answer.  [default: the server's]")
@click.option("--dense", is_flag=True, help="Compute all neurons and all tokens, to compare with.")
@click.option("--token-share", type=Share(), help="Share of image tokens that are kept.  [default: the bundle's]")
@click.option("--neuron-share", type=Share(), help="Share of neurons that decode computes.  [default: the bundle's]")
@click.option("--guard", is_flag=True, help="Draft sparsely, check each draft with the dense model, give its answer.")
@click.option("--temperature", type=click.FloatRange(0), metavar="T", help="Draw at this temperature; 0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), metavar="P", help="Draw among the tokens that hold this mass.")
@click.option("--top-k", type=Count(0), help="Draw among the N most likely tokens; 0 is all.")
@click.option("--seed", type=Count(0, 2**31 - 1), help="Seed of random choices.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeat it for several.")
@click.option(
    "--deadline", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Longest time of the answer."
)
@click.option("--wait", type=click.FloatRange(0), default=0, metavar="SECONDS",
              help="How long to wait for a server that is starting.")  # fmt: skip
@json_option
@quiet_option
def command(
    url: str, paths: tuple[str, ...], prompt: str, system: str | None, model: str | None, api_key: str | None, dense: bool,
    guard: bool, stop: tuple[str, ...], wait: float, as_json: bool, quiet: bool, **fields: Any,
) -> None:  # fmt: skip
    """Ask a server about pictures; the answer streams to stdout, one summary line goes to stderr."""
    if not prompt.strip():
        raise InputError("the prompt is empty", where="--prompt", fix='ask something, such as "Describe the picture."')

    from ...serving.client import Question, Server

    given = {name: fields[name] for name in _FIELDS if fields[name] is not None}
    given |= {"dense": True} if dense else {}
    given |= {"stop": list(stop)} if stop else {}
    given |= {"guard": _guard()} if guard else {}
    question = Question(prompt, [_picture(path) for path in paths], system, given)
    started, first, text = time.perf_counter(), None, ""
    pieces = Server(url, model, api_key, wait=wait).ask(question)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            figures: dict[str, Any] = end.value
            break
        first = first or time.perf_counter() - started
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    seconds = {"first_text_s": first, "answer_s": time.perf_counter() - started}
    if as_json:
        emit_json({"text": text, "url": url, **figures, "client": seconds})
        return
    print(flush=True)  # ends the streamed line
    if not quiet:
        line = summary(figures) if "neurons_kept" in figures else f"first text after {first or 0:.2f} s"
        for note in [*figures.get("notes", ()), f"{line}; {seconds['answer_s']:.2f} s until here"]:
            print(f"cm-export: {note}", file=sys.stderr)


def _guard() -> int:
    from ...host.guard import EVERY

    return EVERY


def _picture(path: str) -> bytes:
    """The bytes of the file; what a server can read of them it says itself."""
    from ...base.paths import expanded
    from ...host import picture_source

    if path == "-":
        return picture_source.standard_input().read()
    with picture_source.open_file(expanded(path)) as file:
        return file.read()
