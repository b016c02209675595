"""How a checkpoint weight is called in the weight file."""

from types import ModuleType


def is_neuron_major(name: str, family: ModuleType) -> bool:
    """Whether the weight file holds the transpose of this checkpoint weight: a neuron of `down` becomes a row."""
    return name.endswith(family.DOWN) and name.startswith(family.LAYER.split("{")[0])


def stored_name(name: str, family: ModuleType) -> str:
    """The name in the weight file: `..._t` where it is stored transposed."""
    return f"{name}_t" if is_neuron_major(name, family) else name


def core_row_names(family: ModuleType, layers: int) -> list[tuple[str, str, str]]:
    """Names in the weight file of every layer's gate, up and (transposed) down matrix."""
    return [
        tuple(
            stored_name(family.LAYER.format(layer=i) + part, family) for part in (family.GATE, family.UP, family.DOWN)
        )
        for i in range(layers)
    ]
