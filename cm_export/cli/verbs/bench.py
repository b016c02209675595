"""`cm-export bench`: how fast a bundle is, sparse and dense in the same process."""

from pathlib import Path

import click

from ..console import (
    Count,
    Verb,
    backend_option,
    bundle_argument,
    command_line,
    device_option,
    emit_json,
    json_option,
    progress,
    quiet_option,
    threads_option,
)
from ..recipe_options import recipe_option


@click.command(
    cls=Verb,
    short_help="Measure a bundle's speed, sparse beside dense.",
    examples=(
        "cm-export bench demo.plan",
        "cm-export bench engine.plan --image-tokens 1024 --new-tokens 64 --token-share 0.33 --threads 4 --json",
    ),
)
@bundle_argument
@click.option("--prompt-tokens", type=Count(1), default=32, show_default=True, help="Text tokens.")
@click.option(
    "--image-tokens",
    type=Count(0),
    help="Image tokens, of pictures or clips alike.  [default: 256; 0 if the model takes no pictures]",
)
@click.option("--new-tokens", type=Count(1), default=32, show_default=True, help="Tokens decoded.")
@click.option("--repeats", type=Count(1), default=5, show_default=True, help="Timed runs of each kind.")
@recipe_option("--neuron-share")
@recipe_option("--token-share")
@click.option("--vision", is_flag=True, help="Time the vision graph as well; it is the same for both.")
@backend_option
@device_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, prompt_tokens: int, image_tokens: int | None, new_tokens: int, repeats: int, neuron_share: float | None,
    token_share: float | None, vision: bool, backend: str | None, device: str | None, threads: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure time to first token and decode speed on made-up inputs, sparse beside dense."""
    from ...evals.bench import measure

    with progress(quiet or as_json) as step:
        report = measure(
            bundle,
            prompt_tokens=prompt_tokens,
            image_tokens=image_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            neuron_share=neuron_share,
            token_share=token_share,
            threads=threads,
            vision=vision,
            backend=backend,
            device=device,
            progress=step,
        )
    report["command"] = command_line()
    if as_json:
        emit_json(report)
    else:
        from ..tables import print_rows

        print_rows(report, title=f"speed of {bundle}")
