"""A trained model as a judge of one class against the rest: at a threshold, or the one that reaches a wanted rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dltrain import curves
from dltrain.errors import ConfigError
from dltrain.lazy import torch
from dltrain.registry import suggest
from dltrain.tasks import probabilities

if TYPE_CHECKING:
    from dltrain.evaluate import Evaluation
    from dltrain.trained import Trained


@dataclass(frozen=True)
class Question:
    """Which class is the positive one, and at which threshold, or by which rate on which split that is chosen.

    rate: one of curves.RULES, or None where the threshold is given
    value: the threshold, or the rate that is wanted
    choose_on: None: val where the run holds images out, else the split that is evaluated
    """

    positive: str
    rate: str | None = None
    value: float = 0.5
    choose_on: str | None = None


def asked(positive: str | None, given: Mapping[str, float | None], choose_on: str | None) -> Question | None:
    """The question that the options ask; `given` is `threshold` and the rates.  Raises ConfigError where they clash."""
    values = {name: value for name, value in given.items() if value is not None}
    options = [f"--{name.replace('_', '-')}" for name in values]
    if len(options) > 1:
        raise ConfigError(f"{' and '.join(options)}: give one of them, each of them names a threshold")
    for option, value in zip(options, values.values(), strict=True):
        if not 0 <= value <= 1:
            raise ConfigError(f"{option} {value:g}: expected a share in 0..1")
    if positive is None and (options or choose_on):
        raise ConfigError(f"{options[0] if options else '--choose-on'}: of which class? --positive CLASS says it")
    if choose_on not in (None, "train", "val", "test"):
        raise ConfigError(f"--choose-on {choose_on}: expected train, val or test")
    rate, value = next(iter(values.items()), ("threshold", 0.5))
    if choose_on and rate == "threshold":
        raise ConfigError("--choose-on says where a threshold is chosen: it needs a rate, such as --type-1-error 0.01")
    return None if positive is None else Question(positive, None if rate == "threshold" else rate, value, choose_on)


def class_number(which: str, classes: Sequence[str]) -> int:
    """The place of the class of that name, or, where no class has a number for its name, of that number."""
    if which in classes:
        return list(classes).index(which)
    numbered = any(name.isdecimal() for name in classes)
    if which.isdecimal() and int(which) < len(classes) and not numbered:
        return int(which)
    raise ConfigError(f"--positive: no class '{which}'{suggest(which, classes)}")


def check(question: Question | None, model: Trained) -> None:
    """Raises ConfigError where the model's task is no classification, or it has no class of that name or number."""
    if not model.task.classifies:
        option = "--positive" if question else "--curves"
        raise ConfigError(f"{option} is of classes, and this model's task is {model.config.task.name}")
    if question:
        class_number(question.positive, model.classes)


def scores(found: Evaluation, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of class `number`, float64 `[N]`, and which images are of it, bool `[N]`.

    In float64, as float32 would round the probabilities of sure predictions to the same 1.
    """
    return probabilities(found.outputs.double())[:, number], found.labels == number


Drawn = list[tuple[str, curves.Curve]]  # of each class


def answer(
    question: Question | None,
    model: Trained,
    split: str,
    found: Evaluation,
    data_root: str | None,
    warn: Callable[[str], None],
) -> tuple[dict[str, Any], Drawn]:
    """What a model that made `found` of a split makes of one class there, or without a question of each, and its curve.

    The former is ready for JSON.  Raises ConfigError where no threshold reaches the rate, or where there is no split to
    choose it on.
    """
    if question is None:
        drawn = [(name, curves.curve(*scores(found, number))) for number, name in enumerate(model.classes)]
        rows = [{"class": name, **_areas(each), "curve": curves.points(each)} for name, each in drawn]
        return {"curves": rows}, drawn
    number = class_number(question.positive, model.classes)
    evaluated = {split: scores(found, number)}
    threshold, chosen = question.value, None
    if question.rate:
        chosen_on = question.choose_on or ("val" if model.config.data.val else split)
        if chosen_on not in evaluated:
            from dltrain import trained

            _, other = trained.judge(model, chosen_on, data_root, lambda text: None)  # which has been said
            evaluated = {chosen_on: scores(other, number), **evaluated}
        try:
            threshold = curves.threshold_for(curves.curve(*evaluated[chosen_on]), question.rate, question.value)
        except ConfigError as error:
            raise ConfigError(f"--positive {question.positive}, {chosen_on}: {error}") from None
        which, reach = curves.RULES[question.rate]
        chosen = {"split": chosen_on, "which": which, "rate": question.rate, "reach": reach, "wanted": question.value}
        if doubt := _doubt(chosen_on, split):
            warn(f"the threshold is chosen on {chosen_on}, {doubt}: choose it on images held out (data.val, val)")
    curve_of = {name: curves.curve(*each) for name, each in evaluated.items()}
    one_class = {
        "class": model.classes[number],
        "threshold": threshold,
        "chosen": chosen,
        "splits": {name: {**curves.at(*evaluated[name], threshold), **_areas(curve_of[name])} for name in evaluated},
        "curve": curves.points(curve_of[split]),
    }
    return {"positive": one_class}, [(model.classes[number], curve_of[split])]


def _doubt(chosen_on: str, split: str) -> str | None:
    if chosen_on == split:
        return "the split that it is judged on, so that the rates there are better than those of other images"
    return {"train": "which the model has learned", "test": "which is to judge and not to choose by"}.get(chosen_on)


def _areas(curve: curves.Curve) -> dict[str, float | None]:
    return {"auc": curves.auc(curve), "average_precision": curves.average_precision(curve)}
