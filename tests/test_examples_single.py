"""The examples as what they are: single-device programs that learn, without ffjax."""

import dataclasses
import functools
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("gpt", "convnet", "recommender", "moe")


def load(name: str) -> ModuleType:
    """The example's module, loaded from its file: `examples/` is no package."""
    qualified = f"examples_single_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[qualified] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[qualified])
    return sys.modules[qualified]


def shapes(tree):
    """Structure, shapes and dtypes of a tree of arrays, NNX modules among them."""
    avals = jax.tree.map(lambda x: (jnp.shape(x), str(jax.dtypes.result_type(x))), tree)
    return jax.tree.structure(tree), jax.tree.leaves(avals)


@functools.cache
def initial(name: str, config):
    """A real state of the configuration; kept, so no test may donate it."""
    return jax.jit(load(name).init, static_argnums=0)(config, jax.random.key(0))


def losses(name: str, config, steps: int, distinct: int) -> list[float]:
    """The loss of each step over `distinct` batches, taken in turn."""
    module = load(name)
    data = itertools.cycle(list(itertools.islice(module.batches(config), distinct)))
    found = []
    if name == "convnet":
        state = module.init(config, jax.random.key(0))
        step = nnx.jit(module.make_train_step(config))
        found = [float(step(*state, batch)["loss"]) for batch in itertools.islice(data, steps)]
    else:
        state = initial(name, config)
        step = jax.jit(module.make_train_step(config))
        for batch in itertools.islice(data, steps):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls(name: str) -> None:
    found = losses(name, load(name).Config.tiny(), steps=24, distinct=4)
    assert np.isfinite(found).all()
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:4]), found


@pytest.mark.parametrize("name", NAMES)
def test_example_args_are_the_real_arguments(name: str) -> None:
    module = load(name)
    config = module.Config.tiny()
    *example_state, example_batch = module.example_args(config)
    state = module.init(config, jax.random.key(0)) if name == "convnet" else initial(name, config)
    assert shapes(tuple(example_state)) == shapes(state if len(example_state) > 1 else (state,))
    batch = next(module.batches(config))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    assert shapes(example_batch) == shapes(batch)


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_the_seed_alone(name: str) -> None:
    module = load(name)
    config = module.Config.tiny()
    first, again, other = (next(module.batches(config, seed)) for seed in (1, 1, 2))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, first, other)))


@pytest.mark.parametrize(
    ("name", "preset"),
    [*itertools.product(NAMES, ["tiny", "small", "__call__"]), ("gpt", "gpt2"), ("gpt", "gpt3_6b7")],
)
def test_every_preset_traces_without_allocating(name: str, preset: str) -> None:
    module = load(name)
    config = module.Config() if preset == "__call__" else getattr(module.Config, preset)()
    args = module.example_args(config)
    step = module.make_train_step(config)
    if len(args) == 3:
        metrics = nnx.eval_shape(step, *args)
    else:
        state, metrics = jax.eval_shape(step, *args)
        assert shapes(state) == shapes(args[0])
    assert metrics["loss"].shape == ()
    assert metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_about_sharding(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    pattern = (
        r"Mesh\b|NamedSharding|PartitionSpec|with_sharding_constraint|with_partitioning|shard_map|pmap|jax\.devices"
    )
    assert re.findall(pattern, source) == []
    assert source.count("import ffjax") == 1
    assert hasattr(load(name), "train_step")


@functools.cache
def gpt_metrics(scan_layers: bool, remat: bool) -> dict[str, jax.Array]:
    """Loss and gradient norm of the tiny GPT, from parameters that do not depend on the options."""
    gpt = load("gpt")
    config = dataclasses.replace(gpt.Config.tiny(), scan_layers=scan_layers, remat=remat)
    example = gpt.example_args(dataclasses.replace(config, scan_layers=False))[0]
    params = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), example.params)
    if scan_layers:
        layers = [params.pop(f"layer_{i}") for i in range(config.layers)]
        params["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    state = gpt.example_args(config)[0].replace(
        step=0, params=params, opt_state=gpt.make_optimizer(config).init(params)
    )
    state = state.replace(dropout_key=jax.random.key(0))
    step = gpt.make_train_step(config)
    return jax.jit(lambda state, batch: step(state, batch)[1])(state, next(gpt.batches(config)))


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, False), (False, True), (True, True)])
def test_gpt_scan_and_remat_change_no_numbers(scan_layers: bool, remat: bool) -> None:
    plain, other = gpt_metrics(False, False), gpt_metrics(scan_layers, remat)
    assert jax.tree.map(float, other) == pytest.approx(jax.tree.map(float, plain), rel=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dropout": 0.1, "tied_head": True}], ids=str)
def test_gpt_options_learn(options: dict[str, object]) -> None:
    config = dataclasses.replace(load("gpt").Config.tiny(), scan_layers=True, **options)
    found = losses("gpt", config, steps=16, distinct=2)
    assert np.mean(found[-2:]) < 0.8 * np.mean(found[:2]), found


def test_gpt_sees_no_later_byte() -> None:
    gpt = load("gpt")
    config = gpt.Config.tiny()
    state = initial("gpt", config)
    tokens = next(gpt.batches(config))["inputs"][:1]
    changed = tokens.copy()
    changed[:, 20:] += 1
    logits = state.apply_fn({"params": state.params}, np.concatenate([tokens, changed]), gpt.rotary_table(config))
    np.testing.assert_allclose(logits[0, :20], logits[1, :20], rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits[0, 20:], logits[1, 20:])


def test_convnet_step_mutates_statistics_and_dropout_key() -> None:
    convnet = load("convnet")
    config = convnet.Config.tiny()
    model, optimizer = convnet.init(config, jax.random.key(0))
    before = np.asarray(model.norm.mean[...]), int(model.dropout.rngs.count[...])
    nnx.jit(convnet.train_step)(model, optimizer, next(convnet.batches(config)))
    assert not np.allclose(model.norm.mean[...], before[0])
    assert int(model.dropout.rngs.count[...]) == before[1] + 1
    assert int(optimizer.step[...]) == 1


def test_moe_queues_hold_one_token_a_place() -> None:
    gates = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (4, 32, 8)))
    combine, balance = load("moe").route(gates, 8)
    places = np.asarray(combine > 0)
    assert places.sum(axis=1).max() == 1  # no place is given twice
    assert places.any(axis=3).sum(axis=2).max() == 2  # a token goes to two experts at most
    assert places.sum() < 2 * 4 * 32  # with random gates some queue overflows
    np.testing.assert_allclose(combine.sum(axis=(2, 3))[places.sum(axis=(2, 3)) == 2], 1, rtol=1e-6)
    assert balance >= 1 - 1e-5


def test_moe_drops_second_choices_before_first_ones() -> None:
    gates = jnp.array([[[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.6, 0.4, 0.0]]])  # the three tokens of a sequence
    combine, _ = load("moe").route(gates, 2)
    np.testing.assert_allclose(combine[0].sum(-1), [[0.6, 0.4, 0], [0, 0.6, 0], [0.6, 0, 0]], rtol=1e-6)


def test_recommender_interactions_are_each_pair_once() -> None:
    recommender = load("recommender")
    config = dataclasses.replace(recommender.Config.tiny(), top=())
    params = recommender.init_params(config, jax.random.key(0))
    batch = next(recommender.batches(config))
    # A top layer of ones over the pairs and zeros elsewhere leaves the sum of all pairs' dots.
    ones = jnp.ones_like(params["top"][0]["kernel"]).at[: config.width].set(0)
    params["top"] = [{"kernel": ones, "bias": jnp.zeros(1)}]
    logits = recommender.predict(params, batch)
    features = [recommender.mlp(params["bottom"], batch["dense"])]
    features += [params["tables"][field][batch[field]] for field in recommender.FIELDS]
    pairs = sum((a * b).sum(-1) for a, b in itertools.combinations(features, 2))
    np.testing.assert_allclose(logits, pairs, rtol=1e-4, atol=1e-4)
