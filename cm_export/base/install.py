"""The pip command that brings more of this program, from where it came: before a release, no index knows its name.

pip_install("tune")   pip install --editable '/home/me/cm-export[tune]'      a checkout installed for editing
                      pip install 'cm-export[tune] @ git+https://...'        from a repository
                      pip install 'cm-export[tune]'                          from an index
"""

import json
from importlib import metadata
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "cm-export"


def pip_install(extra: str = "", options: str = "") -> str:
    """The command, as it can be typed; `options` stand before the name. What an installer recorded says where it came from."""
    # Several may be found: a checkout that is the working directory has metadata of its own, which no installer wrote.
    records = (found.read_text("direct_url.json") for found in metadata.distributions(name=DISTRIBUTION))
    try:
        record = json.loads(next(filter(None, records), "{}"))
    except ValueError:
        record = {}
    name, url = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION, record.get("url", "")
    if url.startswith("file:"):
        name = unquote(urlsplit(url).path) + (f"[{extra}]" if extra else "")
    elif "vcs_info" in record:
        name = f"{name} @ {record['vcs_info']['vcs']}+{url}"
    elif url:
        name = f"{name} @ {url}"
    editable = "--editable " if record.get("dir_info", {}).get("editable") else ""
    return f"pip install {options + ' ' if options else ''}{editable}'{name}'"
