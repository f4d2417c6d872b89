"""What is drawn is what was found: arrays and bins read back from the pictures."""

import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from analysis import figures
from analysis.dictionary import CosineByDistance
from analysis.layers import LayerCounts
from analysis.svg import average_columns, to_svg
from analysis.variance import VarianceShares
from tests.analysis.made_up import LAYERS, dense, padded


@pytest.fixture(scope="module")
def latents():
    a = dense(3, 120, 4, 50, share=0.05)
    a[:, :, 11] = 0
    counts = LayerCounts(LAYERS, 50)
    for i, layer in enumerate(LAYERS):
        counts.update(layer, *padded(a[:, i]))
    return counts.compute()


def image_of(figure):
    (image,) = figure.axes[0].images
    return np.asarray(image.get_array())


def test_heatmap_is_p_of_alive_latents_by_mean_layer(latents):
    shown = image_of(figures.layer_heatmap(latents, latents.p, "p"))
    order = sorted(set(range(50)) - {11}, key=lambda f: latents.mean[f])
    np.testing.assert_allclose(shown, latents.p[:, order])
    assert shown.shape == (4, 49)
    np.testing.assert_allclose(shown.sum(0), 1)
    numbers = np.array(LAYERS)
    assert (np.diff(numbers @ shown) >= -1e-12).all()


def test_heatmap_of_counts(latents):
    shown = image_of(figures.layer_heatmap(latents, latents.counts, "rows", gamma=0.25))
    assert np.array_equal(np.sort(shown.sum(0)), np.sort(latents.count[latents.is_alive]))


def test_many_latents_are_averaged_not_dropped():
    values = np.random.default_rng(0).random((3, 1000))
    shown = average_columns(values, 300)
    assert shown.shape == (3, 300)
    edges = np.linspace(0, 1000, 301).astype(int)
    np.testing.assert_allclose(
        shown, [[row[a:b].mean() for a, b in itertools.pairwise(edges)] for row in values]
    )
    assert np.array_equal(average_columns(values, 1000), values)


def test_mean_layer_histogram_has_sixteen_bins_a_layer(latents):
    figure = figures.mean_layers(latents)
    bars = figure.axes[0].patches
    assert len(bars) == 16 * 4
    expected, edges = np.histogram(latents.mean[latents.is_alive], 64, (0, 9), density=True)
    np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1])


def test_distances_to_the_nearest_layer_are_drawn_with_the_same_bins_for_every_run(latents):
    bars = figures.mean_layers(latents).axes[1].patches
    means = latents.mean[latents.is_alive]
    distances = [min(abs(mean - layer) for layer in LAYERS) for mean in means.tolist()]
    expected, edges = np.histogram(distances, 24, (0, 2.5), density=True)  # layers 4 and 9 are 5 apart
    np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1], atol=1e-12)


def test_layers_active_in_aggregate_and_on_one_token(latents):
    pairs = np.array([0, 60, 30, 10, 0])
    bars = figures.layers_active(latents, pairs).axes[0].patches
    heights = [bar.get_height() for bar in bars]
    alive = latents.n_layers[latents.is_alive]
    np.testing.assert_allclose(heights[:4], [(alive == n).mean() for n in (1, 2, 3, 4)])
    np.testing.assert_allclose(heights[4:], [0.6, 0.3, 0.1, 0.0])


def test_variance_parts_fill_the_bar():
    nan = float("nan")
    parts = {
        "var_l": 10.0,
        "var_l_f": 6.0,
        "var_l_tf": 2.0,
        "between_t": 4.0,
        "between_f": 4.0,
        "rel_f": 0.6,
        "rel_t": 1 / 3,
        "identity": 0.0,
    }
    shares = [
        VarianceShares(weighting=w, n_latents=1, n_tokens=1, n_pairs=1, min_tokens=1, **parts)
        for w in ("mass", "latent")
    ]
    bars = figures.variance_shares(shares).axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.2, 0.2, 0.4, 0.4, 0.4, 0.4])
    np.testing.assert_allclose([bar.get_x() for bar in bars], [0, 0, 0.2, 0.2, 0.6, 0.6])
    empty = VarianceShares(
        weighting="mass", n_latents=0, n_tokens=0, n_pairs=0, min_tokens=1, **dict.fromkeys(parts, nan)
    )
    to_svg(figures.variance_shares([empty]), "empty")


def test_cosines_by_distance_columns_sum_to_one():
    counts = np.zeros((3, 10), np.int64)
    counts[0, 4:7], counts[1, 5] = (1, 2, 1), 8
    found = CosineByDistance(counts=counts, distance_edges=np.array([0.0, 1, 2, 3]), cosine_edges=np.linspace(-1, 1, 11), mean=np.array([0.1, 0.0, np.nan]))  # fmt: skip
    shown = image_of(figures.cosine_distance(found))
    np.testing.assert_allclose(shown.sum(0), [1, 1, 0])


def test_one_layer_can_be_drawn():
    """Of one layer no latent has a spread, and nothing has a neighbour."""
    counts = LayerCounts((7,), 6)
    counts.update(7, *padded(dense(0, 30, 1, 6)[:, 0]))
    one = counts.compute()
    for figure in (figures.layer_heatmap(one, one.p, "p"), figures.mean_layers(one), figures.shapes(one), figures.layers_active(one, np.array([0, 5]))):  # fmt: skip
        ET.fromstring(to_svg(figure, "one"))


def test_svg_is_well_formed_and_fills_its_place(latents):
    text = to_svg(figures.layer_heatmap(latents, latents.p, "p"), "heat")
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    assert root.get("viewBox")
    assert root.get("width") is root.get("height") is None
    referred = {v.split("#")[1].rstrip(")") for e in root.iter() for v in e.attrib.values() if "#" in v and ("url(" in v or v.startswith("#"))}  # fmt: skip
    ids = {e.get("id") for e in root.iter() if e.get("id")}
    assert referred <= ids
    assert all(name.startswith("heat-") for name in ids)
