"""Pictures with one to four coloured shapes on a 3x3 board, and questions whose answers are known: drawn from a seed.

    . . r        describe the image .    there are two shapes : a red circle at the top right and a teal ...
    . . .   ->   where is the ... ?      the teal triangle is at the bottom left .
    t . .        is the ... above ... ?  no , the teal triangle is below the red circle .

Seven types of question: long descriptions, two kinds of counting, place, what is at a place, relation, colours.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # pixels along one side
SPLITS = {"train": 0, "validation": 1, "test": 2}  # seed of picture i = 3 i + split: splits never share a seed
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("describe", "count_all", "count_some", "where", "what_at", "relation", "colors")
_NUMBERS = ("zero", "one", "two", "three", "four")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Thing:
    """One shape: its colour and kind, its box in pixels (x0, y0, x1, y1) and its cell (row, column) of the board."""

    color: str
    shape: str
    box: tuple[int, int, int, int]
    cell: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed that drew them."""

    seed: int
    things: tuple[Thing, ...]


def scene(split: str, number: int) -> Scene:
    """The picture `number` of a split; always the same."""
    seed = len(SPLITS) * number + SPLITS[split]
    rng = random.Random(f"scene {seed}")
    cells = rng.sample([(r, c) for r in range(3) for c in range(3)], rng.randint(1, 4))
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], len(cells))
    things = []
    for (row, column), (color, shape) in zip(sorted(cells), names, strict=True):
        width, tall = rng.randint(14, 26), rng.randint(14, 26)
        height = {"circle": width, "rectangle": tall, "triangle": round(width * 0.866)}[shape]
        # The whole shape lies in its cell, so that its place has one name.
        cell = SIZE // 3
        x = column * cell + rng.randint(1, cell - width - 2)
        y = row * cell + rng.randint(1, cell - height - 2)
        things.append(Thing(color, shape, (x, y, x + width, y + height), (row, column)))
    return Scene(seed, tuple(things))


def draw(scene: Scene) -> Image.Image:
    """The RGB picture of a scene, SIZE x SIZE."""
    rng = random.Random(f"ground {scene.seed}")
    # Drawn at twice the size and scaled down, so that edges are soft.
    picture = Image.new("RGB", (2 * SIZE, 2 * SIZE), tuple(rng.randint(230, 255) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x0, y0, x1, y1 = (2 * v for v in thing.box)
        if thing.shape == "triangle":
            pen.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=COLORS[thing.color])
        elif thing.shape == "circle":
            pen.ellipse([x0, y0, x1, y1], fill=COLORS[thing.color])
        else:
            pen.rectangle([x0, y0, x1, y1], fill=COLORS[thing.color])
    return picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def labels(scene: Scene, cells: int) -> np.ndarray:
    """[cells,cells] int64: 0 ground, otherwise 1 + colour * 3 + shape of the thing covering most (over 20 %) of a cell."""
    edge = np.arange(cells) * SIZE // cells
    size = SIZE // cells
    out, covered = np.zeros((cells, cells), np.int64), np.full((cells, cells), 0.2)
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        across = np.clip(np.minimum(x1, edge + size) - np.maximum(x0, edge), 0, None)
        down = np.clip(np.minimum(y1, edge + size) - np.maximum(y0, edge), 0, None)
        share = np.outer(down, across) / size**2
        more = share > covered
        out[more] = 1 + list(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
        covered[more] = share[more]
    return out


def place(cell: tuple[int, int]) -> str:
    """A cell in words: "top left" ... "center" ... "bottom right"."""
    return "center" if cell == (1, 1) else f"{_ROWS[cell[0]]} {_COLUMNS[cell[1]]}"


def ask(scene: Scene, kind: str, salt: int = 0) -> tuple[str, str] | None:
    """(question, answer) of one kind, chosen by seed and salt; None where the kind needs two things and there is one."""
    rng, things = random.Random(f"{kind} {scene.seed} {salt}"), scene.things
    count = len(things)
    if kind == "describe":
        listed = _listing([f"a {t.name} at the {place(t.cell)}" for t in things])
        return "describe the image .", f"there {_are(count)} {_some(count, 'shape')} : {listed} ."
    if kind == "count_all":
        return "how many shapes are there ?", f"there {_are(count)} {_some(count, 'shape')} ."
    if kind == "count_some":
        if rng.random() < 0.5:
            color = rng.choice([t.color for t in things] + [rng.choice(list(COLORS))])
            n = sum(t.color == color for t in things)
            return f"how many {color} shapes are there ?", f"there {_are(n)} {_some(n, color + ' shape')} ."
        shape = rng.choice(SHAPES)
        n = sum(t.shape == shape for t in things)
        return f"how many {shape}s are there ?", f"there {_are(n)} {_some(n, shape)} ."
    if kind == "where":
        thing = rng.choice(things)
        return f"where is the {thing.name} ?", f"the {thing.name} is at the {place(thing.cell)} ."
    if kind == "what_at":
        cell = rng.choice(things).cell if rng.random() < 0.7 else (rng.randrange(3), rng.randrange(3))
        found = next((t for t in things if t.cell == cell), None)
        what = f"there is a {found.name}" if found else "there is nothing"
        return f"what is at the {place(cell)} ?", f"{what} at the {place(cell)} ."
    if kind == "relation":
        if count < 2:
            return None
        one, other = rng.sample(things, 2)
        axes = [(i, words) for i, words in enumerate((("above", "below"), ("left of", "right of")))]
        axis, words = rng.choice([(i, w) for i, w in axes if one.cell[i] != other.cell[i]])
        asked, true = rng.choice(words), words[int(one.cell[axis] > other.cell[axis])]
        answer = f"{'yes' if asked == true else 'no'} , the {one.name} is {true} the {other.name} ."
        return f"is the {one.name} {asked} the {other.name} ?", answer
    if kind == "colors":
        colors = sorted({t.color for t in things})
        subject = "the colors are" if len(colors) > 1 else "the color is"
        return "what colors are present ?", f"{subject} {_listing(colors)} ."
    raise ValueError(f"no kind of question is called {kind!r}")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _some(count: int, what: str) -> str:
    return f"{_NUMBERS[count]} {what}{'' if count == 1 else 's'}"


def _listing(words: list[str]) -> str:
    return words[0] if len(words) == 1 else " , ".join(words[:-1]) + " and " + words[-1]
