import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from ipywidgets import IntSlider

from kdlib.crf import LinearChainCRF, legal_iob2
from kdlib.lab import plots
from kdlib.losses import Surrogates, path_counts
from kdlib.text.tags import Span

ROWS = pd.DataFrame(
    {
        "method": ["posterior"] * 4,
        "seed": [0, 0, 1, 1],
        "step": [1, 2, 1, 2],
        "dev_f1": [10.0, 20.0, 12.0, 24.0],
    }
)


def drawn(folder):
    plots.style()
    figure, axes = plt.subplots()
    plots.curves(axes, ROWS, "step", "dev_f1")
    plots.save(folder / "03_x", ROWS, "A caption.", figure, seeds=2)


def test_a_rerun_gives_identical_bytes(tmp_path):
    for name in ("a", "b"):
        drawn(tmp_path / name)
    for file in ("03_x.svg", "03_x.csv", "index.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a" / "03_x.csv"), ROWS)


def test_a_dot_in_a_name_is_no_ending(tmp_path):
    for alpha in (0.2, 0.5):
        plots.save(tmp_path / f"01_table_alpha{alpha}", ROWS, "A caption.")
    assert {f.name for f in tmp_path.glob("*.csv")} == {
        "01_table_alpha0.2.csv",
        "01_table_alpha0.5.csv",
    }


@pytest.mark.parametrize(("folder", "suffix"), [("..", ""), ("x", "/../../y"), ("", "")])
def test_nothing_is_written_outside_the_figures(folder, suffix):
    with pytest.raises(ValueError, match="expected a folder of figures/ and a suffix without"):
        plots.Album(Path(folder), suffix)


def test_two_processes_with_caches_of_their_own_lose_no_entry(tmp_path):
    code = "import sys; from pathlib import Path; import pandas as pd\n"
    code += "from kdlib.lab import plots\n"
    code += "for i in range(8): "
    code += "plots.save(Path(sys.argv[1]) / f'03_{sys.argv[2]}{i}', pd.DataFrame({'a': [i]}), 'x')"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "x"), name],
            env=os.environ | {"KDLIB_CACHE": str(tmp_path / name)},
        )
        for name in "ab"
    ]
    assert [process.wait() for process in both] == [0, 0]
    index = json.loads((tmp_path / "x" / "index.json").read_text())
    assert sorted(index) == sorted(f"03_{name}{i}" for name in "ab" for i in range(8))


def test_the_gallery_names_caption_seeds_and_notebook(tmp_path):
    drawn(tmp_path / "demo")
    plots.gallery(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "![demo: A caption.](demo/03_x.svg)" in text and "A caption." in text and "seeds: 2" in text
    )
    assert json.loads((tmp_path / "demo" / "index.json").read_text())["03_x"]["figure"] is True


def test_a_figure_is_one_click_from_the_notebook_that_names_it():
    wanted = {"03_f1_lstm": "03a", "03_msd_table": "03b", "02_stages": "02b", "02_f1": "02a"}
    for stem, begins in wanted.items():
        assert plots._drawn_by(stem).name.startswith(begins)
    assert plots._drawn_by("03_no_such_figure") is None


def test_markup_in_a_sentence_shows_as_text():
    html = plots.entities_html(("<script>", "A&B", "ran"), [Span(0, 2, "<b>")], {"<b>": "#ffcc00"})
    assert "<script>" not in html and "<b>" not in html
    assert "&lt;script&gt; A&amp;B" in html and "ran" in html
    with pytest.raises(ValueError, match="colour of X"):
        plots.entities_html(("a",), [Span(0, 1, "X")], {"X": 'red" onload="x'})


def test_marked_text_is_escaped_whatever_it_holds():
    text = "<b>Rome</b> & 'x'"
    html = plots.marked_html(text, [{"start": 3, "end": 7, "label": "<i>"}], {"<i>": "#ffcc00"})
    assert "<b>" not in html and "<i>" not in html
    assert (
        html.startswith("&lt;b&gt;<mark")
        and "Rome <small>&lt;i&gt;</small></mark>&lt;/b&gt; &amp; &#x27;x&#x27;" in html
    )
    with pytest.raises(ValueError, match="expected entities that do not overlap"):
        plots.marked_html(
            "New York",
            [{"start": 0, "end": 8, "label": "x"}, {"start": 4, "end": 8, "label": "x"}],
            {},
        )


def test_a_lattice_shows_every_count_and_dashes_what_is_only_legal():
    crf = LinearChainCRF(3, legal_iob2(["O", "B-X", "I-X"]))
    paths = torch.tensor([[[0, 0, 0], [1, 2, 0]]])
    unary, pairwise = path_counts(
        paths, torch.tensor([[0.6, 0.4]]), torch.ones(1, 3, dtype=torch.bool), 3
    )
    _, axes = plt.subplots()
    plots.lattice(
        axes,
        ["a", "b", "c"],
        ["O", "B-X", "I-X"],
        Surrogates(unary, pairwise, unary > 0),
        crf.legal_transitions,
    )
    steps = {(tuple(line.get_ydata()), line.get_linestyle()) for line in axes.lines}
    assert steps == {
        ((2, 2), "-"),
        ((1, 0), "-"),
        ((0, 2), "-"),
        ((1, 2), "--"),
    }  # O I is no IOB2, B O is in no path
    assert [t.get_text() for t in axes.get_yticklabels()] == ["I-X", "B-X", "O"]


def test_pushes_are_minus_the_gradient_of_each_loss():
    plots.style()  # titles stand on the left
    guess = torch.tensor([[[0.3, -0.2], [0.1, 0.5]]], requires_grad=True)
    figure, pushed = plots.pushes(
        {"square": guess.square().sum(), "sum": guess.sum()}, guess, ["a", "b"], ["O", "B-X"]
    )
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["square", "sum"]
    square = pushed.query("loss == 'square'")[["O", "B-X"]].to_numpy()
    assert torch.allclose(torch.tensor(square), -2 * guess.detach()[0])
    assert (pushed.query("loss == 'sum'")[["O", "B-X"]] == -1).all(axis=None)


def test_a_live_picture_follows_its_control_and_tells_an_error(monkeypatch):
    monkeypatch.delenv(plots.BATCH, raising=False)
    plt.close("all")
    boxes = []
    monkeypatch.setattr(plots, "display", boxes.append)

    def draw(n):
        if n == 3:
            raise ValueError("n: expected at most 2, got <3>")
        return plt.figure() if n == 2 else plots.HTML(f"n is {n}")

    control = IntSlider(value=1, max=3)
    plots.live(draw, n=control)
    slider, picture = boxes[0].children
    assert (slider.description, picture.value) == ("n", "n is 1")
    control.value = 2
    assert picture.value.startswith('<img src="data:image/png;base64,')
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="at most 2"):
        control.value = 3
    assert picture.value == "<pre>ValueError: n: expected at most 2, got &lt;3&gt;</pre>"


def test_a_live_picture_is_drawn_once_in_a_batch(monkeypatch):
    monkeypatch.setenv(plots.BATCH, "1")
    seen = []
    monkeypatch.setattr(plots, "display", seen.append)
    plots.live(lambda n: plots.HTML(f"n is {n}"), n=IntSlider(value=1))
    assert [html.data for html in seen] == ["n is 1"]
