"""What a report says of gates: accuracy per layer and kind of token, experts that are alike."""

import warnings

import matplotlib
import pytest
import torch

from cephalo_lite.moe.gates import train_gates
from cephalo_lite.moe.gates.inputs import GateInputs
from cephalo_lite.moe.gates.report import GateReport

matplotlib.use("Agg")
NAMES = ["one", "two", "three"]


def judged_by_hand() -> GateInputs:
    """Eight tokens of three experts; one-hot states, so that gates can be written down."""
    expert = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    kind = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    return GateInputs(torch.eye(3)[expert].expand(2, -1, -1), expert, kind, expert)


def gate(rows, bias=(0.0, 0.0, 0.0)) -> dict[str, torch.Tensor]:
    return {"gate.weight": torch.tensor(rows), "gate.bias": torch.tensor(bias)}


RIGHT = gate([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
BLIND = gate([[1.0, 0, 0], [0, 1.0, 1.0], [0, 1.0, 1.0]], (0.0, 0.1, 0.0))  # two = three, two wins


@pytest.fixture(scope="module")
def report():
    """Layer 4 of the model is right, layer 7 takes three's tokens for two's."""
    made = GateReport("tokens", NAMES, [4, 7], train_losses=[1.1, 0.6, 0.4] * 4)
    made.held_out_losses = [0.9, 0.7, 0.65]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.judge([RIGHT, BLIND], judged_by_hand())
    assert [str(entry.message) for entry in caught] == made.warnings
    return made


def test_accuracy_per_layer_and_kind(report):
    assert report.accuracy == [1.0, 0.75]
    assert report.mean_accuracy == 0.875
    assert set(report.accuracy_by_kind) == {"image", "prompt"}  # no answer token was judged
    assert report.accuracy_by_kind["image"] == pytest.approx([1, 2 / 3])
    assert report.mean_accuracy_by_kind == pytest.approx({"image": 5 / 6, "prompt": 0.9})


def test_experts_that_are_alike_are_named(report):
    assert report.apart["one", "two"] == report.apart["one", "three"] == [1.0, 1.0]
    assert report.apart["two", "three"] == [1.0, 0.5]
    assert report.condition[0] == pytest.approx(1, abs=1e-5) and report.condition[1] > 1e4
    alike, flat = report.warnings
    assert "'two' from 'three' in layers [7]" in alike and "50%" in alike
    assert "layers [7]" in flat and "condition number" in flat


def test_table(report):
    assert report.table().splitlines() == [
        "layer     all   image  prompt",
        "    4  100.0%  100.0%  100.0%",
        "    7   75.0%   66.7%   80.0%",
        " mean   87.5%   83.3%   90.0%",
    ]


def test_plot(report):
    figure = report.plot()
    left, right = figure.axes
    training, held_out = left.lines
    assert list(training.get_ydata()) == report.train_losses
    assert list(held_out.get_ydata()) == report.held_out_losses
    assert list(held_out.get_xdata()) == [5, 10, 12]  # every 5 steps, and after the last
    assert list(right.lines[0].get_ydata()) == pytest.approx([1, 2 / 3])
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["4", "7"]
    figure.canvas.draw()
    axes = matplotlib.figure.Figure().subplots(1, 2)
    assert report.plot(axes) is axes[0].figure
    matplotlib.pyplot.close(figure)


def test_plot_of_many_layers_and_language_losses():
    """32 layers get at most 16 ticks; losses on answers have a panel of their own."""
    made = GateReport("cephalo-2024", NAMES, list(range(32)), [0.5] * 32)
    made.accuracy_by_kind, made.train_losses = {"answer": [0.5] * 32}, [1.0]
    made.language_losses = [3.0, 2.0]
    figure = made.plot()
    assert len(figure.axes) == 3
    assert list(figure.axes[1].lines[0].get_ydata()) == [3.0, 2.0]
    assert len(figure.axes[2].get_xticks()) <= 16
    figure.canvas.draw()
    matplotlib.pyplot.close(figure)


@pytest.mark.filterwarnings("ignore:.*hardly differ:UserWarning")
def test_samples_that_are_the_same_give_a_warning(make_mixture, small_processor, synth):
    """Experts two and three were shown the same; one's samples differ."""
    model = make_mixture(expert_names=NAMES)

    def samples(letter, kind):
        text = f"<|user|>\n<|image_1|>\n{letter * 9}<|end|>\n"
        return [(text, synth(56, 56, kind=kind))] * 4

    given = [samples("k", 0), samples("z", 1), samples("z", 1)]
    with pytest.warns(
        UserWarning, match=r"cannot tell 'two' from 'three' in layers \[0\]"
    ) as caught:
        report = train_gates(model, small_processor, given, progress=False)
    assert all("'one'" not in str(entry.message) for entry in caught)
    assert caught[0].filename == __file__  # it points at the caller
    assert report.apart["two", "three"][0] == 0.5 and min(report.apart["one", "two"]) > 0.8
