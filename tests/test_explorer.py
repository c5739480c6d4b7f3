"""The Explorer's payload holds the arrays it was given, and bad input is named in one sentence."""

import base64
import io
import json
import re

import ipywidgets
import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from lib import ROOT, explorer
from lib.explorer import Explorer

AXES = {"δ (delta)": [1.0, 2.0, 4.0], "α (alpha)": [0.0, 0.5, 1.0]}
SEED = 0


def payload(shown: Explorer) -> dict:
    script = re.search(r'<script type="application/json">(.*?)</script>', shown.html, re.DOTALL)
    return json.loads(script.group(1))


def picture(src: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))).convert("RGB"))


def frame(panel: dict, number: int) -> np.ndarray:
    row, column = divmod(number, panel["columns"])
    height, width = panel["height"], panel["width"]
    sheet = picture(panel["src"])
    return sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]


def field(shape=(3, 3, 5, 7)) -> np.ndarray:
    return np.random.default_rng(SEED).random(shape)


def pixels(shape=(3, 3, 6, 4, 3)) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def test_density_frames_are_the_array_in_viridis():
    array = field()
    shown = Explorer(AXES, density={"X": dict(array=array, extent=(0, 7, 0, 5), vmax=1.0)})
    panel = payload(shown)["panels"][0]
    colours = colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    assert panel["strides"] == [3, 1]
    for number, expected in enumerate(array.reshape(9, 5, 7)):
        got = frame(panel, number)[::-1]  # row 0 is the lowest y
        assert (got == colours[np.round(255 * expected).astype(int)]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_stored_without_loss(channels):
    array = pixels((3, 3, 6, 4, channels))
    panel = payload(Explorer(AXES, images={"samples": array}))["panels"][0]
    for number, expected in enumerate(array.reshape(9, 6, 4, channels)):
        assert (frame(panel, number) == expected).all()


def test_curves_are_stored_to_a_tenth_of_a_drawing_unit():
    lines = field((3, 3, 20))
    lines[1, 2, 4] = np.nan
    markers, dots = 19 * field((3, 3)), 19 * field((3, 3, 5))
    given = dict(
        x=np.arange(20), lines={"forget": lines}, markers={"mean": markers}, dots={"points": dots}
    )
    curves = dict(given, ylim=(0, 1), xlim=(0, 19))
    panel = payload(Explorer(AXES, curves={"NLL": curves}))["panels"][0]
    line, marker, dot = panel["series"]
    height = panel["floor"] - panel["top"]
    left, right = panel["x"][0] / 10, panel["x"][-1] / 10
    stored = np.array(line["frames"], dtype=float).reshape(lines.shape)
    assert np.isnan(stored[1, 2, 4])
    np.testing.assert_allclose((panel["floor"] - stored / 10) / height, lines, atol=0.051 / height)
    for series, wanted in ((marker, markers), (dot, dots)):
        stored = np.array(series["frames"], dtype=float).reshape(wanted.shape)
        got = 19 * (stored / 10 - left) / (right - left)
        np.testing.assert_allclose(got, wanted, atol=19 * 0.051 / (right - left))


def test_values_are_written_with_their_format():
    shares = np.linspace(0, 0.2, 9).reshape(3, 3)
    words = np.array([["rule", "limit", "rule"]])
    shown = Explorer(AXES, values={"share": dict(array=shares, format=".1%"), "stopped": words})
    share, stopped = payload(shown)["values"]
    assert " ".join(share["text"]) == "0.0% 2.5% 5.0% 7.5% 10.0% 12.5% 15.0% 17.5% 20.0%"
    assert stopped == {"label": "stopped", "strides": [0, 1], "text": ["rule", "limit", "rule"]}


def test_length_one_and_missing_axes_mean_no_dependence():
    x = np.arange(20)
    lines = {"first": field((3, 1, 20)), "second": field((1, 3, 20)), "none": field((20,))}
    panel = payload(Explorer(AXES, curves={"NLL": dict(x=x, lines=lines)}))["panels"][0]
    assert [series["strides"] for series in panel["series"]] == [[1, 0], [0, 1], [0, 0]]
    assert [len(series["frames"]) for series in panel["series"]] == [3, 3, 1]


def test_first_view_is_the_start_position():
    array = pixels()
    shown = Explorer(AXES, images={"samples": array}, start={"δ (delta)": 4, "α (alpha)": 0.5})
    still = re.search(r'<img [^>]*src="([^"]*)"', shown.html).group(1)
    assert (picture(still) == array[2, 1]).all()
    assert "Shown: δ (delta) = 4, α (alpha) = 0.5." in shown.html


def density_print(array) -> str:
    return Explorer(AXES, density={"X": dict(array=array, extent=(0, 1, 0, 1))}).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1],
        lambda a: a[:, ::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: a[:, :, ::-1],
        lambda a: a[..., ::-1],
        lambda a: 1.02 * a,
    ],
    ids=["reversed", "reversed second axis", "swapped axes", "upside down", "mirrored", "scaled"],
)
def test_fingerprint_notices_a_changed_payload(change):
    assert density_print(field()) != density_print(change(field()))


def test_fingerprint_ignores_float_noise():
    noise = np.random.default_rng(1).normal(size=(3, 3, 5, 7))
    assert density_print(field()) == density_print(field() + 1e-6 * noise)


def test_fingerprint_is_exact_for_pictures_and_knows_the_axes():
    array = pixels()
    changed = array.copy()
    changed[2, 1, 3, 2, 0] ^= 1
    prints = {
        Explorer(AXES, images={"samples": array}).fingerprint(),
        Explorer(AXES, images={"samples": changed}).fingerprint(),
        Explorer(AXES, images={"other": array}).fingerprint(),
        Explorer(dict(reversed(AXES.items())), images={"samples": array}).fingerprint(),
    }
    assert len(prints) == 4
    assert all(re.fullmatch("[a-p]{8}", found) for found in prints)  # no digits: see fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images={"s": pixels((3, 4, 6, 4, 3))}), r"shape \(3, 4, 6, 4, 3\), wanted one lead"),
        (dict(density={"X": dict(array=field((3, 5, 7)), extent=(0, 1, 0, 1))}), "wanted one lead"),
        (dict(values={"share": np.zeros(3)}), "wanted one leading dimension an axis"),
        (dict(axes={}, values={"share": 1.0}), "got 0 axes"),
        (dict(), "and 0 panels"),
        (dict(axes={"δ": []}, values={"share": 1.0}), "'δ' is empty"),
        (dict(axes={"δ": [1, 3, 2]}, values={"share": 1.0}), "wanted values that increase"),
        (dict(axes={"δ": [1, 1]}, values={"share": 1.0}), "wanted values that increase"),
        (dict(images={"s": np.zeros((3, 3, 6, 4, 3))}), "type float64, wanted uint8"),
        (dict(images={"s": pixels((3, 3, 6, 4, 2))}), "2 channels, wanted 1 or 3"),
        (dict(density={"X": dict(array=np.full((2, 2), np.nan), extent=(0, 1, 0, 1))}), "nan"),
        (dict(density={"X": dict(array=np.full((2, 2), np.inf), extent=(0, 1, 0, 1))}), "infinite"),
        (dict(density={"X": dict(array=np.zeros((2, 2)), extent=(0, 1, 0, 1))}), "vmin < vmax"),
        (dict(curves={"c": dict(x=[0, 1], lines={"l": np.zeros(3)})}), "3 points, wanted 2"),
        (dict(curves={"c": dict(x=[1, 0], lines={"l": np.zeros(2)})}), "values that increase"),
        (dict(curves={"c": dict(x=[0, 1], lines={"l": [0, 1]}, ylim=(1, 0))}), "smaller one first"),
        (
            dict(curves={"c": dict(x=[0, 1], lines={"l": [0, 1]}, colors={"l": "red"})}),
            "'red', wanted one of blue",
        ),
        (dict(values={"share": 1.0}, start={"γ": 1}), "axis 'γ', wanted one of"),
        (dict(values={"share": 1.0}, start={"δ (delta)": 3}), "is 3, wanted one of"),
    ],
)
def test_bad_input_is_named_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Explorer(**dict(axes=AXES) | arguments)
    assert "\n" not in str(error.value)


def test_a_payload_that_would_bloat_the_page_is_refused():
    with pytest.raises(ValueError, match=r"takes \d\.\d\d MB, wanted at most 1\.5 MB"):
        Explorer(AXES, images={"noise": pixels((3, 3, 256, 256, 3))})


def test_labels_are_escaped():
    label = "</script><b>x</b>"
    shown = Explorer({label: [1, 2]}, values={label: [1.0, 2.0]}, title=label, caption=label)
    assert "<b>" not in shown.html
    assert payload(shown)["values"][0]["label"] == label


def test_the_book_gets_html_and_text_and_only_jupyter_a_widget(monkeypatch):
    shown = Explorer(AXES, images={"samples": pixels()}, values={"share": np.eye(3)})
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert bundle["text/plain"].endswith(f"fingerprint {shown.fingerprint()}")
    monkeypatch.setattr(explorer, "in_live_frontend", lambda: True)
    view = shown._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    assert set(view) >= {"model_id"}


def test_live_sliders_without_compute_show_the_stored_frames():
    array = pixels()
    delta, alpha, view = Explorer(AXES, images={"samples": array}).widget().children
    assert isinstance(delta, ipywidgets.SelectionSlider)
    delta.index, alpha.index = 2, 1
    shown = re.search(r'src="(data:[^"]*)"', view.value).group(1)
    assert (picture(shown) == array[2, 1]).all()


def test_live_sliders_compute_any_value_on_the_stored_scale():
    calls = []

    def compute(delta, alpha):
        calls.append((delta, alpha))
        panel = {"array": np.full((5, 7), delta / 8)}
        return {"density": {"X": panel}, "values": {"share": delta * alpha}}

    density = dict(array=field(), extent=(0, 7, 0, 5), vmin=0, vmax=1)
    values = {"share": dict(array=np.zeros((3, 3)), format=".1%")}
    shown = Explorer(AXES, density={"X": density}, values=values, compute=compute)
    delta, alpha, view = shown.widget().children
    alpha.value = 0.5
    delta.value = 2.5
    assert calls == [(1.0, 0.5), (2.5, 0.5)]
    assert "125.0%" in view.value  # the format of the stored panel
    colours = colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    drawn = picture(re.search(r'src="(data:[^"]*)"', view.value).group(1))
    assert (drawn == colours[round(255 * 2.5 / 8)]).all()  # its colour scale as well


def test_an_error_in_compute_is_shown_to_the_reader():
    def compute(delta, alpha):
        raise RuntimeError("the flow diverged")

    shown = Explorer(AXES, values={"share": np.eye(3)}, compute=compute)
    delta, _alpha, view = shown.widget().children
    with pytest.raises(RuntimeError, match="the flow diverged"):
        delta.value = 2.5
    assert "RuntimeError: the flow diverged" in view.value


def test_computing_needs_a_function():
    with pytest.raises(ValueError, match="no compute function"):
        Explorer(AXES, values={"share": np.eye(3)}).at(delta=1, alpha=1)


def test_the_script_is_small_and_works_from_a_file():
    script = (ROOT / "book/_static/explorer.js").read_text()
    assert len(script) < 10_000
    assert not re.search(r"\bfetch\s*\(|^\s*(import|export)\b", script, re.MULTILINE)
