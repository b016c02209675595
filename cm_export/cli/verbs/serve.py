"""`cm-export serve`: answer over HTTP as OpenAI's API does, with a page to try it on."""

import ipaddress
from pathlib import Path

import click

from ...base.errors import InputError
from ..console import (
    Count,
    Verb,
    backend_option,
    bundle_argument,
    device_option,
    progress,
    quiet_option,
    threads_option,
)

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


@click.command(
    cls=Verb,
    short_help="Answer over HTTP, as OpenAI's API does.",
    examples=(
        "cm-export serve demo.plan",
        "cm-export serve engine.plan --port 9000 --at-once 4 --max-tokens 512",
        "cm-export serve engine.plan --host 0.0.0.0 --api-key KEY",
    ),
)
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=Count(0, 65535), default=8000, show_default=True, help="Port; 0 takes one that is free.")
@click.option("--name", help="What clients call the model.  [default: the bundle's name without .plan]")
@click.option("--api-key", envvar="CM_EXPORT_API_KEY", metavar="KEY",
              help="Clients have to send it; better set the variable CM_EXPORT_API_KEY, which others cannot see.")  # fmt: skip
@click.option("--open", "is_open", is_flag=True, help="Answer on a public address without a key.")
@click.option("--at-once", type=Count(1), default=8, show_default=True, help="Requests that are answered together.")
@click.option("--lanes", type=Count(0), default=0,
              help="Decode in so many threads side by side.  [default: one for each core for a tiny model, else 1]")  # fmt: skip
@click.option("--queue", type=Count(1), default=64, show_default=True, help="Requests that may wait; more are refused.")
@click.option("--deadline", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Longest time of a request that names none.  [default: any]")  # fmt: skip
@click.option("--max-tokens", type=Count(1), default=1024, show_default=True,
              help="Longest answer, also of a request that names no length.")  # fmt: skip
@click.option("--max-pictures", type=Count(0), default=8, show_default=True, help="Most pictures of a request.")
@click.option(
    "--max-pixels", type=Count(1), default=50, show_default=True, help="Most pixels of a request, in millions."
)
@click.option("--max-body", type=Count(1), default=32, show_default=True, help="Largest request, in MiB.")
@click.option("--drain", type=Count(1), default=30, show_default=True, metavar="SECONDS",
              help="After SIGTERM, how long requests may take to be finished.")  # fmt: skip
@click.option("--no-warm-up", is_flag=True, help="Be ready without reading the largest picture first.")
@click.option("--log-prompts", is_flag=True, help="Write questions into the log.  [default: no text of clients]")
@backend_option
@device_option
@threads_option
@quiet_option
def command(
    bundle: Path, host: str, port: int, name: str | None, api_key: str | None, is_open: bool, at_once: int, lanes: int,
    queue: int, deadline: float | None, max_tokens: int, max_pictures: int, max_pixels: int, max_body: int, drain: int,
    no_warm_up: bool, log_prompts: bool, backend: str | None, device: str | None, threads: int, quiet: bool,
) -> None:  # fmt: skip
    """Answer over HTTP as OpenAI's API does; the URL goes to stdout, the log to stderr, one JSON object a line.

    SIGTERM or Ctrl-C ends it, after the requests that are there. The page at / asks about a picture that is dropped on it.
    """
    public = not _is_loopback(host)
    if public and not (api_key or is_open):
        fix = "set CM_EXPORT_API_KEY (or --api-key), or add --open if everyone who reaches it may use it"
        raise InputError("a public address needs an API key", where=f"--host {host}", fix=fix)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
        raise InputError(
            "has characters that no header holds", where="--api-key", fix="use ASCII without blanks at its ends"
        )
    try:
        from ...serving.http_server import bound, serve, url
    except ImportError as e:
        from ...base.install import pip_install

        raise InputError(f"serving needs {e.name}, which is not installed", fix=pip_install("serve")) from e
    from ...host.loaded import LoadedBundle, opened
    from ...serving import log
    from ...serving.app import Service, Settings, application
    from ...serving.cores import divided
    from ...serving.messages import Bounds
    from ...serving.metrics import Measured, Prometheus
    from ...serving.pools import few_pools
    from ...serving.scheduler import Scheduler

    few_pools()
    bounds = Bounds(tokens=max_tokens, pictures=max_pictures, pixels=max_pixels * 1_000_000)
    hosts = None if public or api_key else _LOCAL | {f"[{host}]" if ":" in host else host.lower()}
    called = name or bundle.resolve().name.removesuffix(".plan")
    settings = Settings(called, api_key, bounds, max_body * 2**20, hosts=hosts, log_prompts=log_prompts,
                        warm_up=not no_warm_up)  # fmt: skip
    with bound(host, port) as listening:  # before anything is loaded: it may be taken
        with progress(quiet) as step:
            step("open the bundle")
            found = opened(bundle)
            threads, lanes = divided(found, backend, threads, lanes, at_once)
            model = LoadedBundle(found, threads, backend=backend, device=device)
        _ = model.chat  # raises where the bundle has no tokenizer
        figures = Prometheus()
        with model, Scheduler(model, at_once, queue, Measured(figures), deadline, lanes) as scheduler:

            def started() -> None:
                if public and not api_key:
                    log.write("warning", "open", message="everyone who reaches this address may use it")
                log.write("info", "listening", url=url(listening), model=called, threads=threads or "all", lanes=lanes)
                print(url(listening), flush=True)

            serve(application(Service(model, scheduler, figures, settings)), listening, drain, started)
            log.write("info", "stopped")


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name may be anything, so of those only localhost counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
