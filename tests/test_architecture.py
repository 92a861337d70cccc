"""Imports go one way, and what must be light stays light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dltrain

PACKAGE = Path(dltrain.__file__).parent

# each level imports from those below it alone
LEVELS = [
    {"text", "spans", "statistics"},
    {"chart", "errors", "lazy", "tables", "__init__"},
    {"gpu.diagnose", "gpu.nvml", "gpu.rates", "gpu.worker"},
    {"gpu.facts", "gpu.report", "gpu.selftest", "gpu.watch"},
    {"registry", "yamlfile", "optimizers", "data.lock"},
    {"plugins", "mistakes", "metrics", "launch", "stopping"},
    {"data.dataset", "data.download", "data.random", "modules", "curves"},
    {"data.files", "models.activations", "losses", "optim", "schedules", "figures"},
    {"tasks"},
    {"models.initial", "models.templates", "data.listing", "data.pictures"},
    {"averages", "data.augment", "data.colour", "data.mix", "data.cache"},
    {"data.svhn", "data.usps", "data.npz", "data.synthetic", "data.folder"},
    {"data.mnist", "data.cifar", "data.digits", "models.layers", "models.perceptron", "models.mlp", "rundir"},
    {"models.norms", "models.pools", "models.blocks", "models.conv_nd", "data.moving", "data.lines"},
    {"models.cnn", "models.torchvision", "models.autoencoder", "checkpoint", "device", "data.warp", "distributed"},
    {"data.policy"},
    {"data.prepare", "data.prefetch"},
    {"data.batches"},
    {"components"},
    {"config", "catalogue", "shipped"},
    {"schema", "sharing", "sweepfile", "overview"},
    {"evaluate", "reference"},
    {"groups", "compiling"},
    {"build"},
    {"state", "trained"},
    {"averaging", "export", "image_by_image", "predict", "thresholds"},
    {"board", "compare", "layerstats"},
    {"logs", "report", "step"},
    {"train"},
    {"runs"},
    {"batched", "dryrun", "gradcheck", "lr_find", "verify_resume"},
    {"ways"},
    {"gpu.expect"},
    {"gpu.check"},
    {"bench", "study", "profiling", "seeds", "vary"},
    {"sweep"},
    {"cli"},
    {"__main__"},
]
# what `dltrain --help`, a config's check and a missing file need: a top-level torch costs them more than a second
LIGHT = {
    *(
        "cli",
        "errors",
        "text",
        "spans",
        "lazy",
        "registry",
        "yamlfile",
        "plugins",
        "mistakes",
        "components",
        "config",
        "schema",
        "reference",
        "shipped",
        "catalogue",
        "launch",
        "stopping",
        "sweepfile",
    ),
    *("losses", "tasks", "optim", "schedules", "averages", "rundir", "tables"),
    *("statistics", "overview", "compare"),
    *("metrics", "curves", "thresholds"),
    *(f"gpu.{name}" for name in ("check", "diagnose", "facts", "nvml", "rates", "report", "selftest", "watch")),
    "gpu.worker",
    *("data.dataset", "data.files", "data.download", "data.mnist", "data.cifar", "data.digits", "data.augment"),
    *("data.svhn", "data.usps", "data.npz", "data.synthetic", "data.folder", "data.moving", "data.lines"),
    *("data.lock", "data.listing", "data.pictures", "data.cache"),
    *("data.prepare", "data.prefetch", "data.batches", "data.random"),
    *("data.colour", "data.mix", "data.warp", "data.policy"),
    *("models.activations", "models.layers", "models.perceptron", "models.mlp", "models.cnn", "models.torchvision"),
    *("models.initial", "models.templates", "models.norms", "models.pools", "models.blocks", "models.conv_nd"),
    "models.autoencoder",
}
HEAVY = {"torch", "torchvision", "sklearn", "matplotlib", "safetensors", "tensorboard", "scipy", "pandas"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts)
        if name.endswith(".__init__"):
            assert not path.read_text().strip(), f"{path}: packages are folders here, and say nothing of their own"
        else:
            found[name] = path
    return found


def imports(path: Path, top_level: bool) -> set[str]:
    """The modules that a file imports: everywhere in it, or where it is read (and not only for types)."""
    tree = ast.parse(path.read_text())
    if top_level:
        nodes: list[ast.AST] = []
        waiting: list[ast.AST] = [tree]
        while waiting:
            node = waiting.pop()
            nodes.append(node)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not guarded and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting += list(ast.iter_child_nodes(node))
    else:
        nodes = list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_every_module_has_its_level() -> None:
    named = [name for level in LEVELS for name in level]
    assert sorted(named) == sorted(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_from_below_alone(name: str) -> None:
    level = next(index for index, names in enumerate(LEVELS) if name in names)
    below = set().union(*LEVELS[:level])
    own = {
        each.removeprefix("dltrain.")
        for each in imports(modules()[name], top_level=False)
        if each.startswith("dltrain.") and each.removeprefix("dltrain.") in modules()
    }
    assert own - below == set()


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_nothing_heavy(name: str) -> None:
    found = {each.partition(".")[0] for each in imports(modules()[name], top_level=True)}
    assert found & HEAVY == set()


def test_light_modules_import_light_ones_alone() -> None:
    light = LIGHT | {"__init__"}
    for name in sorted(LIGHT):
        found = {each.removeprefix("dltrain.") for each in imports(modules()[name], top_level=True)}
        assert found & set(modules()) <= light, name


def test_components_never_see_a_config() -> None:
    components = [
        name for name in modules() if name.startswith(("models.", "data.")) or name in ("losses", "optim", "schedules")
    ]
    for name in components:
        found = imports(modules()[name], top_level=False)
        assert not {"dltrain.config", "dltrain.cli"} & found, name


def test_nothing_here_unpickles() -> None:
    """torch.load and pickle.load would run what a stranger's file says; CIFAR's batches have a reader of their own."""
    for name, path in modules().items():
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        forbidden = {"torch.load", "pickle.load", "pickle.loads", "np.load", "yaml.load", "eval", "exec"}
        if name == "plugins":  # which runs what the user's own config names
            forbidden.remove("exec")
        assert not calls & forbidden, name
