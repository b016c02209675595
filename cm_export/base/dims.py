"""Axis letters and the names of the cache, defined once; tensors in docstrings and graph inputs use them.

B batch            S prompt tokens      T kept prompt tokens   P tokens in the cache   M cache rows read (core tokens)
N new tokens of one decode step (N image patches, in the vision graph)
D hidden size      F FFN neurons        K kept neurons         L decoder layers        V vocabulary
C pictures of a prompt
H query heads      Hk key/value heads   d head size            N image patches         I image tokens (N / merge^2)
"""

# Names of the dynamic axes as they appear in the ONNX graphs and the manifest.
BATCH = "batch"
PROMPT = "prompt"
KEPT = "kept"
PAST = "past"
NEW = "new"
CONTEXT = "context"
CORE_NEURONS = "core_neurons"
CORE_TOKENS = "core_tokens"
PATCHES = "patches"
SEGMENTS = "segments"
IMAGE_TOKENS = "image_tokens"
PICTURES = "pictures"


def cache_names(layers: int, prefix: str) -> list[str]:
    """`present.0.key`, `present.0.value`, `present.1.key`, ..."""
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]
