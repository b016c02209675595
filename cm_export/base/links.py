"""Symbolic links, as hub caches, volumes and stores are made of: what is behind one, and one that leads nowhere.

snapshots/c0ffee/model.safetensors -> ../../blobs/5eed        behind_links: .../blobs/5eed
dead: "is a symbolic link to ../../blobs/5eed, which is not there" after a copy that left blobs/ out
"""

import os
from pathlib import Path


def behind_links(path: Path) -> Path:
    """The file that `path` stands for; renaming onto a link would put a file in the place of the link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def dead(path: Path) -> str | None:
    """What to say of a link behind which nothing is; None for anything else."""
    if not path.is_symlink() or path.exists():
        return None
    return f"is a symbolic link to {os.readlink(path)}, which is not there"
