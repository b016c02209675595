"""The page of `cm-export serve` in a real browser: a picture is dropped, the answer streams, kept patches lie over it."""

import base64

import chromium
import pytest
from test_report import needs_chromium
from test_serve import QUESTION, model, serving  # noqa: F401  # a fixture

from cm_export.recipe.aliases import DEMO

PICTURE = DEMO.parent / "pictures" / "four-shapes.png"
DROP = """
const bytes = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
const given = new DataTransfer();
given.items.add(new File([bytes], "a.png", { type: "image/png" }));
window.dispatchEvent(new DragEvent("drop", { dataTransfer: given, cancelable: true }));
"""
ASK = """
(async () => {
  const until = async (true_) => { for (let i = 0; i < 1000 && !true_(); i++) await new Promise((r) => setTimeout(r, 10)); };
  await until(() => document.querySelector("#drop.has") && document.getElementById("model").textContent === "demo");
  document.getElementById("question").value = "%s";
  document.getElementById("token_share").value = "0.25";
  document.getElementById("ask").requestSubmit();
  await until(() => document.getElementById("dense").querySelector("dl").children.length);
  await until(() => document.getElementById("stop").hidden);
})()
"""


def text(tab, query):
    return tab.run(f"document.querySelector({query!r}).innerText")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_dropped_picture_is_answered_pruned_and_dense_with_the_kept_patches_over_it(width, dark, model, tmp_path):  # noqa: F811
    alone = model.generate(QUESTION, PICTURE, token_share=0.25)
    with serving(model, hosts=frozenset({"127.0.0.1"})) as (url, _), chromium.Page(width, dark=dark) as tab:
        tab.visit(url)
        tab.run(DROP % base64.b64encode(PICTURE.read_bytes()).decode())
        tab.run(ASK % QUESTION)
        assert text(tab, "#sparse .text") == alone.text.strip()
        assert text(tab, "#dense .text") == model.generate(QUESTION, PICTURE, dense=True).text.strip()
        assert text(tab, "#counted") == f"{alone.kept[0].sum()} of {alone.kept[0].size} patches kept"
        drawn = "document.getElementById('kept').getContext('2d').getImageData(0, 0, 1e4, 1e4).data.some((v) => v)"
        assert tab.run(drawn) and "of the dense model's time; then" in text(tab, "#verdict")
        tab.picture(tmp_path / f"{width}.png")
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert not tab.complaints and {request.split("/")[2] for request in tab.requests if "://" in request} == {
            url[7:]
        }
        tab.run("document.getElementById('question').value = ' '.repeat(3)")
        tab.run("document.getElementById('ask').requestSubmit()")
        tab.run("new Promise((r) => setTimeout(r, 300))")
        assert "has no text" in text(tab, "#wrong")
