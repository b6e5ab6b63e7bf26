"Figures without a display: what they show, that they fit, and one clear line for what cannot be drawn."
import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.plots import (
    block_diagram, claim_plot, learning_curves, plot_scores, prediction_figure, quiet, save_figure, show_clip,
)

FRAMES = np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), dtype=np.uint8)


def every_figure():
    history = [{"step": i, "loss": 1 / (i + 1), "lr": .1} for i in range(5)] + [{"step": 4, "top1": .5}]
    return {
        "clip": show_clip(FRAMES, n=5, title="clip"), "scores": plot_scores(["a", "b"], [.2, .8]),
        "prediction": prediction_figure(FRAMES / 255, ["a", "b", "c"], [.1, .2, .7], times=np.arange(20) / 10),
        "curves": learning_curves(history, smooth=.5), "claim": claim_plot({"A": [.1, .2], "B": .9}, chance=.1, target=.5),
        "blocks": block_diagram({"a": (0, 0, "in"), "b": (1, 0, "out", 2)}, [("a", "b", "[N]")]),
    }


def test_figures_are_written_small_and_the_settings_of_others_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    for name, fig in every_figure().items():
        path = save_figure(fig, tmp_path / "sub" / f"{name}.png")
        assert path.stat().st_size <= 150_000
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 2, f"{name} is blank"
        assert name in ("clip", "blocks") or all(ax.get_xlabel() and (ax.get_ylabel() or not ax.get_yticks().size) for ax in fig.axes)
    assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == sorted(f"{n}.png" for n in every_figure())


def test_a_figure_shows_itself_without_pyplot(monkeypatch):
    shown = []
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    show_clip(FRAMES)._ipython_display_()
    import base64
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]["image/png"]))).size[0] > 300


def test_scores_are_sorted_and_cut():
    ax = plot_scores(list("abcdef"), [.1, .3, .05, .25, .2, .1], k=3).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "d", "e"]
    assert np.allclose([bar.get_width() for bar in ax.patches], [.3, .25, .2])


def test_means_and_lines_of_a_claim():
    ax = claim_plot({"A": [.1, .3], "B": [.8, .9]}, chance=.25).axes[0]
    assert np.allclose([c.get_segments()[0][0, 1] for c in ax.collections], [.2, .85])
    assert any(np.allclose(line.get_ydata(), .25) for line in ax.lines)


def test_curves_go_to_their_panels():
    fig = learning_curves([{"epoch": 0, "loss": 2.0, "val loss": float("nan")}, {"epoch": 1, "loss": 1.0, "top1": .5}])
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "metric"] and fig.axes[0].get_xlabel() == "epoch"
    assert [line.get_label() for line in fig.axes[0].lines] == ["loss", "val loss"]


@pytest.mark.parametrize("call", [
    lambda: show_clip(FRAMES[0]), lambda: show_clip(FRAMES[:0]), lambda: plot_scores(["a"], [.1, .2]), lambda: plot_scores([], []),
    lambda: learning_curves([]), lambda: learning_curves([{"loss": 1.0}]), lambda: claim_plot({}), lambda: claim_plot({"A": []}),
    lambda: block_diagram({"a": (0, 0, "a")}, [("a", "b")]), lambda: save_figure(show_clip(FRAMES), "x.jpg"),
])
def test_what_cannot_be_drawn_is_said_in_one_line(call):
    with pytest.raises(PvnbError) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_figure_that_cannot_fit_leaves_no_file(tmp_path):
    with quiet(), pytest.raises(PvnbError, match="100 bytes"):
        save_figure(show_clip(FRAMES), tmp_path / "x.png", limit=100)
    assert not list(tmp_path.iterdir())
