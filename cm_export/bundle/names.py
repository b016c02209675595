"""How a checkpoint weight is called in the weight file."""

from ..families import Family


def is_neuron_major(name: str, family: Family) -> bool:
    """Whether the weight file holds the transpose of this checkpoint weight: a neuron of `down` becomes a row."""
    return name.endswith(family.down) and name.startswith(family.layer.split("{")[0])


def stored_name(name: str, family: Family) -> str:
    """The name in the weight file: `..._t` where it is stored transposed."""
    return f"{name}_t" if is_neuron_major(name, family) else name


def core_row_names(family: Family, layers: int) -> list[tuple[str, str, str]]:
    """Names in the weight file of every layer's gate, up and (transposed) down matrix."""
    begins = [family.layer.format(layer=i) for i in range(layers)]
    gates, ups, downs = (
        [stored_name(b + part, family) for b in begins] for part in (family.gate, family.up, family.down)
    )
    return list(zip(gates, ups, downs, strict=True))
