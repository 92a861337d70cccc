"""Losses against torch's, against numbers worked out by hand, and in parts against the whole."""

import math

import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import hinge_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from dltrain import losses
from dltrain.errors import ConfigError
from dltrain.registry import component, find

WEIGHTS = [0.5, 1.0, 2.0, 4.0, 0.25]
TWO = [0.75, 0.25]

# every loss with the number of outputs that it takes: those that take mixed images, and those that do not
MIXABLE = [
    pytest.param(losses.cross_entropy, {}, 5, id="cross_entropy"),
    pytest.param(losses.cross_entropy, {"label_smoothing": 0.1}, 5, id="smoothed"),
    pytest.param(losses.cross_entropy, {"class_weights": WEIGHTS}, 5, id="weighted"),
    pytest.param(losses.cross_entropy, {"label_smoothing": 0.2, "class_weights": WEIGHTS}, 5, id="smoothed-weighted"),
    pytest.param(losses.nll, {}, 5, id="nll"),
    pytest.param(losses.nll, {"class_weights": TWO}, 1, id="nll-one-output"),
    pytest.param(losses.bce, {}, 1, id="bce"),
    pytest.param(losses.bce, {"class_weights": TWO}, 1, id="bce-weighted"),
    pytest.param(losses.focal, {"class_weights": WEIGHTS}, 5, id="focal"),
    pytest.param(losses.focal, {"gamma": 0.5}, 1, id="focal-one-output"),
    pytest.param(losses.poly1, {"label_smoothing": 0.1, "class_weights": WEIGHTS}, 5, id="poly1"),
    pytest.param(losses.poly1, {"epsilon": -0.5}, 1, id="poly1-one-output"),
]
CURVED = [  # in the targets
    pytest.param(losses.kl_divergence, {}, 5, id="kl_divergence"),
    pytest.param(losses.kl_divergence, {}, 1, id="kl_divergence-one-output"),
    pytest.param(losses.mse, {}, 5, id="mse"),
    pytest.param(losses.mse, {}, 1, id="mse-one-output"),
    pytest.param(losses.huber, {"delta": 2.0}, 5, id="huber"),
    pytest.param(losses.huber, {"delta": 0.3}, 1, id="huber-one-output"),
    pytest.param(losses.smooth_l1, {"beta": 2.0}, 5, id="smooth_l1"),
    pytest.param(losses.smooth_l1, {"beta": 0.0}, 5, id="l1"),
    pytest.param(losses.smooth_l1, {"beta": 0.3}, 1, id="smooth_l1-one-output"),
]
MARGINS = [
    pytest.param(losses.multi_margin, {"p": 2, "class_weights": WEIGHTS}, 5, id="multi_margin"),
    pytest.param(losses.hinge, {"p": 2, "class_weights": WEIGHTS}, 5, id="hinge"),
    pytest.param(losses.hinge, {"class_weights": TWO}, 1, id="hinge-one-output"),
    pytest.param(losses.perceptron, {}, 5, id="perceptron"),
    pytest.param(losses.perceptron, {}, 1, id="perceptron-one-output"),
]
CASES = [
    *(pytest.param(*case.values, False, id=str(case.id)) for case in MIXABLE + CURVED + MARGINS),
    *(pytest.param(*case.values, True, id=f"{case.id}-mixed") for case in MIXABLE + CURVED),
]
every_loss = pytest.mark.parametrize(("loss", "arguments", "width", "mixed"), CASES)


def batch(size, width, dtype=torch.float64, mixed=False):
    """Logits `[size, width]` that want a gradient, and targets `[size]`, or `[size, classes]` of mixed images."""
    random = torch.Generator().manual_seed(size + 100 * width)
    outputs = 3 * torch.randn(size, width, generator=random, dtype=dtype)
    targets = torch.randint(max(width, 2), (size,), generator=random)
    if mixed:
        other, share = torch.randint(max(width, 2), (size,), generator=random), torch.rand(size, generator=random)
        targets = mix(targets, other, share, max(width, 2))
    return outputs.requires_grad_(), targets


def mix(targets, other, share, classes):
    """float32 `[B, classes]`: `share` of one class and the rest of another, as mixup and cutmix make them."""
    return torch.eye(classes)[targets] * share[:, None] + torch.eye(classes)[other] * (1 - share[:, None])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs_sum_over_the_number_of_images(smoothing, weights):
    outputs, targets = batch(40, 5)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(outputs, targets, tensor, label_smoothing=smoothing, reduction="sum") / 40
    found = losses.cross_entropy(outputs, targets, label_smoothing=smoothing, class_weights=weights)
    torch.testing.assert_close(found, expected)


def test_cross_entropy_without_weights_is_torchs_mean():
    outputs, targets = batch(40, 5)
    torch.testing.assert_close(losses.cross_entropy(outputs, targets), F.cross_entropy(outputs, targets))


def test_cross_entropy_by_hand():
    outputs = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4 1/4, 1/2 1/2
    targets = torch.tensor([0, 1])
    plain = losses.cross_entropy(outputs, targets)
    assert plain.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    smoothed = losses.cross_entropy(outputs, targets, label_smoothing=0.2)  # targets 0.9 0.1, 0.1 0.9
    assert smoothed.item() == pytest.approx((0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2)
    weighted = losses.cross_entropy(outputs, targets, class_weights=[3.0, 1.0])
    assert weighted.item() == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 2)
    mixed = losses.cross_entropy(outputs, torch.tensor([[0.6, 0.4], [0.0, 1.0]]))
    assert mixed.item() == pytest.approx((0.6 * math.log(4 / 3) + 0.4 * math.log(4) + math.log(2)) / 2)


@pytest.mark.parametrize(("loss", "arguments", "width"), MIXABLE)
def test_the_loss_of_a_mixture_is_the_mixture_of_its_classes_losses(loss, arguments, width):
    outputs, targets = batch(12, width)
    other, share = targets.roll(1), torch.rand(12, generator=torch.Generator().manual_seed(0))
    expected = [
        s * loss(one, a, **arguments) + (1 - s) * loss(one, b, **arguments)
        for one, a, b, s in zip(outputs.split(1), targets.split(1), other.split(1), share.double(), strict=True)
    ]
    found = loss(outputs, mix(targets, other, share, max(width, 2)), **arguments)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-6, atol=0)  # the shares are float32


@pytest.mark.parametrize(("loss", "arguments", "width"), MIXABLE + CURVED)
def test_a_mixture_of_one_class_alone_is_that_class(loss, arguments, width):
    outputs, targets = batch(12, width)
    one_hot = torch.eye(max(width, 2))[targets]
    torch.testing.assert_close(loss(outputs, one_hot, **arguments), loss(outputs, targets, **arguments))


def test_nll_of_log_probabilities_is_torchs():
    outputs, targets = batch(40, 5)
    log_probabilities = F.log_softmax(outputs, 1)
    torch.testing.assert_close(losses.nll(log_probabilities, targets), F.nll_loss(log_probabilities, targets))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.nll_loss(log_probabilities, targets, weights, reduction="sum") / 40
    torch.testing.assert_close(losses.nll(log_probabilities, targets, class_weights=WEIGHTS), expected)


def test_nll_of_logits_is_cross_entropy_and_of_one_output_bce():
    torch.testing.assert_close(losses.nll(*batch(40, 5)), losses.cross_entropy(*batch(40, 5)))
    torch.testing.assert_close(losses.nll(*batch(40, 1)), losses.bce(*batch(40, 1)))


def test_bce_is_the_cross_entropy_of_a_second_output_held_at_0():
    outputs, targets = batch(40, 1)
    pairs = torch.cat((torch.zeros_like(outputs), outputs), dim=1)
    torch.testing.assert_close(losses.bce(outputs, targets), F.cross_entropy(pairs, targets))


def test_bce_by_hand_and_far_out():
    outputs = torch.tensor([[math.log(3)], [-1000.0]])
    assert losses.bce(outputs, torch.tensor([1, 1])).item() == pytest.approx((math.log(4 / 3) + 1000) / 2)
    mixed = losses.bce(outputs[:1], torch.tensor([[0.2, 0.8]]))
    assert mixed.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4))


@pytest.mark.parametrize("mixed", [False, True])
def test_weighted_bce_is_torchs_with_the_ratio_as_pos_weight(mixed):
    outputs, targets = batch(40, 1, mixed=mixed)
    positive = (targets[:, 1] if mixed else targets).double()
    ratio = torch.tensor(0.25 / 0.75, dtype=torch.float64)
    expected = 0.75 * F.binary_cross_entropy_with_logits(outputs[:, 0], positive, pos_weight=ratio)
    torch.testing.assert_close(losses.bce(outputs, targets, class_weights=TWO), expected, rtol=1e-6, atol=0)


def test_kl_divergence_is_that_of_torchs_distributions():
    outputs, targets = batch(40, 5, mixed=True)
    expected = torch.distributions.kl_divergence(Categorical(targets.double()), Categorical(logits=outputs))
    torch.testing.assert_close(losses.kl_divergence(outputs, targets), expected.mean(), rtol=1e-5, atol=0)
    outputs, targets = batch(40, 1, mixed=True)
    expected = torch.distributions.kl_divergence(Bernoulli(targets[:, 1].double()), Bernoulli(logits=outputs[:, 0]))
    torch.testing.assert_close(losses.kl_divergence(outputs, targets), expected.mean(), rtol=1e-5, atol=0)


def test_kl_divergence_is_0_where_the_model_is_right_about_a_mixture():
    targets = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert losses.kl_divergence(targets.log(), targets).item() == pytest.approx(0, abs=1e-7)
    assert losses.kl_divergence(targets.log().roll(1, 1), targets).item() > 0.1


def test_kl_divergence_from_one_true_class_is_cross_entropy():
    torch.testing.assert_close(losses.kl_divergence(*batch(40, 5)), losses.cross_entropy(*batch(40, 5)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_one_output_is_torchvisions(gamma):
    outputs, targets = batch(40, 1)
    expected = sigmoid_focal_loss(outputs[:, 0], targets.double(), alpha=0.25, gamma=gamma, reduction="mean")
    torch.testing.assert_close(losses.focal(outputs, targets, gamma=gamma, class_weights=TWO), expected)


def test_focal_by_hand():
    outputs = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4 1/4, 1/2 1/2
    targets = torch.tensor([0, 1])
    expected = (math.log(4 / 3) / 16 + math.log(2) / 4) / 2
    assert losses.focal(outputs, targets).item() == pytest.approx(expected)
    assert losses.focal(outputs, targets, gamma=0.0).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.0])
def test_focal_has_a_slope_where_a_probability_is_1_or_0(gamma):
    outputs = torch.tensor([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(losses.focal(outputs, torch.tensor([0, 1]), gamma=gamma), outputs)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 0.0]]))


def test_poly1_by_hand():
    outputs = torch.tensor([[math.log(3), 0.0]])  # probabilities 3/4 1/4
    target = torch.tensor([0])
    assert losses.poly1(outputs, target).item() == pytest.approx(math.log(4 / 3) + 1 / 4)
    assert losses.poly1(outputs, target, epsilon=-1.0).item() == pytest.approx(math.log(4 / 3) - 1 / 4)
    smoothed = losses.poly1(outputs, target, epsilon=2.0, label_smoothing=0.2)  # targets 0.9 0.1
    assert smoothed.item() == pytest.approx(0.9 * (math.log(4 / 3) + 2 / 4) + 0.1 * (math.log(4) + 2 * 3 / 4))


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.2, "class_weights": WEIGHTS}])
def test_poly1_without_epsilon_is_cross_entropy(arguments):
    found = losses.poly1(*batch(40, 5), epsilon=0.0, **arguments)
    torch.testing.assert_close(found, losses.cross_entropy(*batch(40, 5), **arguments))


REGRESSIONS = [
    pytest.param(losses.mse, {}, F.mse_loss, id="mse"),
    pytest.param(losses.huber, {"delta": 0.7}, F.huber_loss, id="huber"),
    pytest.param(losses.smooth_l1, {"beta": 0.7}, F.smooth_l1_loss, id="smooth_l1"),
    pytest.param(losses.smooth_l1, {"beta": 0.0}, F.l1_loss, id="l1"),
]


@pytest.mark.parametrize(("loss", "arguments", "torchs"), REGRESSIONS)
def test_a_regression_is_torchs_against_one_hot_or_mixed_targets(loss, arguments, torchs):
    given = {} if torchs is F.l1_loss else arguments
    outputs, targets = batch(40, 5)
    torch.testing.assert_close(loss(outputs, targets, **arguments), torchs(outputs, torch.eye(5)[targets], **given))
    outputs, targets = batch(40, 5, mixed=True)
    torch.testing.assert_close(loss(outputs, targets, **arguments), torchs(outputs, targets.double(), **given))


@pytest.mark.parametrize(("loss", "arguments", "torchs"), REGRESSIONS)
def test_a_regression_of_one_output_compares_its_sigmoid_with_0_to_1(loss, arguments, torchs):
    given = {} if torchs is F.l1_loss else arguments
    outputs = torch.tensor([[math.log(3)], [0.0]])  # sigmoids 3/4, 1/2
    expected = torchs(torch.tensor([3 / 4, 1 / 2]), torch.tensor([0.0, 1.0]), **given)
    torch.testing.assert_close(loss(outputs, torch.tensor([0, 1]), **arguments), expected)
    expected = torchs(torch.tensor([3 / 4, 1 / 2]), torch.tensor([0.2, 0.9]), **given)
    torch.testing.assert_close(loss(outputs, torch.tensor([[0.8, 0.2], [0.1, 0.9]]), **arguments), expected)


def test_regressions_by_hand():
    outputs, targets = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([2, 0])  # errors 1 2 2, 1 1 0
    assert losses.mse(outputs, targets).item() == pytest.approx(((1 + 4 + 4) / 3 + (1 + 1 + 0) / 3) / 2)
    huber = losses.huber(outputs, targets, delta=1.5)  # 1/2, 1.5 (2 - 0.75)
    assert huber.item() == pytest.approx(((0.5 + 2 * 1.875) / 3 + (0.5 + 0.5) / 3) / 2)
    assert losses.smooth_l1(outputs, targets, beta=1.5).item() == pytest.approx(huber.item() / 1.5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("p", "margin"), [(1, 1.0), (2, 0.5), (1, 3.0)])
def test_multi_margin_is_torchs(p, margin, weights):
    outputs, targets = batch(40, 5)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.multi_margin_loss(outputs, targets, p=p, margin=margin, weight=tensor)
    found = losses.multi_margin(outputs, targets, p=p, margin=margin, class_weights=weights)
    torch.testing.assert_close(found, expected)


def test_hinge_is_scikit_learns():
    outputs, targets = batch(40, 1)
    expected = hinge_loss(targets, outputs.detach()[:, 0])
    assert losses.hinge(outputs, targets).item() == pytest.approx(expected)
    weighted = hinge_loss(targets, outputs.detach()[:, 0], sample_weight=torch.tensor(TWO)[targets])
    share = torch.tensor(TWO)[targets].mean().item()  # scikit-learn divides by the sum of the weights
    assert losses.hinge(outputs, targets, class_weights=TWO).item() == pytest.approx(weighted * share)
    outputs, targets = batch(40, 5)  # Crammer & Singer's
    assert losses.hinge(outputs, targets).item() == pytest.approx(hinge_loss(targets, outputs.detach()))


def test_hinge_by_hand():
    outputs, targets = torch.tensor([[3.0, 1.0, 2.5], [0.0, 0.0, 4.0]]), torch.tensor([0, 1])  # leads 0.5, -4
    assert losses.hinge(outputs, targets).item() == pytest.approx((0.5 + 5) / 2)
    assert losses.hinge(outputs, targets, p=2, margin=2.0).item() == pytest.approx((1.5**2 + 6**2) / 2)
    one, targets = torch.tensor([[0.25], [-3.0], [0.5]]), torch.tensor([1, 0, 0])  # leads 0.25, 3, -0.5
    assert losses.hinge(one, targets).item() == pytest.approx((0.75 + 0 + 1.5) / 3)


@pytest.mark.parametrize(
    ("start", "target", "moves"),
    [(-1.0, 1, 1), (1.0, 1, 0), (1.0, 0, -1), (-1.0, 0, 0), (0.0, 1, 1), (0.0, 0, -1)],
)
def test_perceptron_with_one_output_is_rosenblatts_rule(start, target, moves):
    weights, inputs = torch.tensor([start, 0.0], requires_grad=True), torch.tensor([2.0, 3.0])
    (slope,) = torch.autograd.grad(losses.perceptron((weights @ inputs).view(1, 1), torch.tensor([target])), weights)
    assert torch.equal(-slope, moves * inputs)


def test_perceptron_moves_the_true_class_and_the_largest_other_alone():
    inputs, targets = torch.tensor([[2.0, 3.0]]), torch.tensor([1])
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.5], [1.0, 1.0]], requires_grad=True)  # outputs 3, 1.5, 5
    loss = losses.perceptron(inputs @ weights.T, targets)
    assert loss.item() == 3.5
    loss.backward()
    assert torch.equal(-weights.grad, torch.tensor([[0.0, 0.0], [2.0, 3.0], [-2.0, -3.0]]))
    assert losses.perceptron(torch.tensor([[0.0, 2.0, 1.0]]), targets).item() == 0


def test_balanced_weights_are_scikit_learns_and_1_in_the_mean():
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 13)
    found = losses.balanced_weights(labels, 3)
    expected = compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy())
    assert found == pytest.approx(expected.tolist())
    assert torch.tensor(found)[labels].mean().item() == pytest.approx(1)


def test_balanced_weights_need_an_image_of_each_class():
    with pytest.raises(ConfigError, match=r"class_weights: balanced .* class 2 has none"):
        losses.balanced_weights(torch.tensor([0, 1, 1, 3]), 4)


@every_loss
def test_parts_weighted_by_their_sizes_add_up_to_the_whole(loss, arguments, width, mixed):
    outputs, targets = batch(23, width, mixed=mixed)
    whole = loss(outputs, targets, **arguments)
    parts = [
        loss(some, true, **arguments) * len(true) / 23
        for some, true in zip(outputs.split([10, 9, 4]), targets.split([10, 9, 4]), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, outputs)[0] for value in (sum(parts), whole)))


@every_loss
def test_gradient_against_finite_differences(loss, arguments, width, mixed):
    outputs, targets = batch(6, width, mixed=mixed)
    assert torch.autograd.gradcheck(lambda outputs: loss(outputs, targets, **arguments), outputs)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, arguments, width, mixed, dtype):
    outputs, targets = batch(64, width, dtype, mixed)
    value = loss(outputs, targets, **arguments)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(outputs.float(), targets, **arguments))


@every_loss
def test_nothing_waits_for_the_device(loss, arguments, width, mixed):
    outputs, targets = batch(8, width, mixed=mixed)
    value = loss(outputs.to("meta"), targets.to("meta"), **arguments)  # a meta tensor has no value to wait for
    assert value.shape == ()


@every_loss
@pytest.mark.parametrize("place", [0, -1])
def test_an_output_that_is_no_number_shows_in_the_loss(loss, arguments, width, mixed, place):
    outputs, targets = batch(4, width, mixed=mixed)
    outputs.data[2, place] = math.nan
    assert loss(outputs, targets, **arguments).isnan()


def test_weights_first_used_by_an_evaluation_serve_training():
    losses._kept.cache_clear()
    outputs, targets = batch(8, 5)
    with torch.inference_mode():
        losses.cross_entropy(outputs.detach(), targets, class_weights=WEIGHTS)
    losses.cross_entropy(outputs, targets, class_weights=WEIGHTS).backward()
    assert losses._kept.cache_info().hits == 1


@pytest.mark.parametrize(
    ("loss", "width", "classes"),
    [
        *((loss, 5, 5) for loss in (losses.cross_entropy, losses.nll, losses.focal, losses.poly1)),
        *((loss, 5, 5) for loss in (losses.multi_margin, losses.hinge)),
        *((loss, 1, 2) for loss in (losses.nll, losses.bce, losses.focal, losses.poly1, losses.hinge)),
    ],
)
def test_weights_are_one_per_class(loss, width, classes):
    outputs, targets = batch(8, width)
    with pytest.raises(ValueError, match=rf"class_weights: expected {classes} weights, one per class, got 3"):
        loss(outputs, targets, class_weights=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.multi_margin])
def test_one_output_is_refused_where_each_class_needs_one(loss):
    with pytest.raises(ValueError, match=r"loss: bce.*loss: hinge.*model\.output: softmax"):
        loss(*batch(8, 1))


@pytest.mark.parametrize("width", [2, 5])
def test_bce_of_several_outputs_says_what_it_needs(width):
    with pytest.raises(ValueError, match=rf"got {width} outputs: .*model\.output: sigmoid.*data\.classes"):
        losses.bce(*batch(8, width))


@pytest.mark.parametrize(("loss", "arguments", "width"), MARGINS)
def test_mixed_images_have_no_margin(loss, arguments, width):
    with pytest.raises(ValueError, match=r"needs one true class an image: leave out mixup and cutmix"):
        loss(*batch(8, width, mixed=True), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cross_entropy", {"label_smoothing": 1.0}),
        ("cross_entropy", {"label_smoothing": -0.1}),
        ("cross_entropy", {"class_weights": [1.0, 0.0]}),
        ("cross_entropy", {"class_weights": [1.0, math.inf]}),
        ("cross_entropy", {"class_weights": 2.0}),
        ("nll", {"class_weights": "balance"}),
        ("focal", {"gamma": -1.0}),
        ("poly1", {"epsilon": -1.5}),
        ("huber", {"delta": 0.0}),
        ("smooth_l1", {"beta": -1.0}),
        ("multi_margin", {"p": 3}),
        ("hinge", {"margin": 0.0}),
    ],
)
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "loss"), arguments)


def test_the_config_may_ask_for_balanced_weights():
    assert component(find("cross_entropy", "loss"), {"class_weights": "balanced"}).args["class_weights"] == "balanced"
