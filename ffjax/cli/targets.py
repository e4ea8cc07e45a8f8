"""What the command line plans: `file.py:function` or `package.module:function`, with the shapes of its arguments.

A module may simply define a step and `example_args()`. The examples' convention makes sizes adjustable:
`Config` (a dataclass), `make_<step>(config)` and `example_args(config)`; then presets are class methods of `Config` and
settings replace its fields.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ffjax.cost.toml_fields import did_you_mean
from ffjax.errors import FfjaxError
from ffjax.sharded import Sharded

EXAMPLE_ARGS = "example_args"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A step and its arguments, arrays or shapes."""

    step: Callable[..., object]
    args: tuple[object, ...]


def load_target(
    text: str, *, args: str | None = None, preset: str | None = None, settings: Mapping[str, str] | None = None
) -> Target:
    """Imports a step and asks for the shapes of its arguments.

    Args:
      text: `file.py:function` or `package.module:function`.
      args: the function that returns the arguments, written likewise, or a name in the same module.
      preset: the name of a class method of the module's `Config`.
      settings: fields of the `Config` to replace, as text.

    Raises:
      FfjaxError: for whatever is missing or does not fit; says what to write instead.
    """
    where, name = _split(text)
    module = _module(where)
    step = _function(module, where, name)
    config = _config(module, where, preset, settings or {})
    maker = getattr(module, f"make_{name}", None)
    if config is not None and callable(maker):
        step = _call(maker, (config,), f"{where}:make_{name}")
    if isinstance(step, Sharded):  # decorated with autoshard: what is planned is the step inside
        step = inspect.unwrap(step, stop=lambda f: not isinstance(f, Sharded))
    return Target(step=step, args=_args(module, where, text, args, config))


def _split(text: str) -> tuple[str, str]:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise FfjaxError(
            f"{text!r} names no function. Remedy: write file.py:function or package.module:function, such as "
            f"{text.rstrip(':') if '/' in text or text.endswith('.py') else 'train.py'}:train_step."
        )
    return where, name


def _module(where: str) -> types.ModuleType:
    """Imports a file as Python runs a script, its folder on the path, or a module with the current folder on it."""
    is_file = where.endswith(".py") or "/" in where
    folder = str(Path(where).resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not is_file:
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name and f"{where}.".startswith(f"{error.name}."):
                raise FfjaxError(
                    f"there is no module {where!r} here. Remedy: check the name, write it as file.py:function, "
                    "or install what it is part of."
                ) from error
            raise _failed(where, error) from error
        except Exception as error:
            raise _failed(where, error) from error
    path = Path(where)
    if not path.is_file():
        raise FfjaxError(f"there is no file {where!r} (in {str(Path.cwd())!r}). Remedy: check the path.")
    spec = importlib.util.spec_from_file_location(f"ffjax_target_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FfjaxError(f"{where!r} is no Python file. Remedy: give one whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _failed(where, error) from error
    return module


def _failed(what: str, error: Exception) -> FfjaxError:
    """What the user's own code raised, and where, without our frames."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError):
        at = f" at {error.filename}:{error.lineno}"
    remedy = "make it run under plain Python first."
    if isinstance(error, ModuleNotFoundError):
        remedy = missing_remedy(error)
    return FfjaxError(f"{what} raised {type(error).__name__}: {error}{at}. Remedy: {remedy}")


def missing_remedy(error: ImportError) -> str:
    """How to install what an import lacks; the examples' own needs are an extra of ffjax."""
    package = (error.name or "").partition(".")[0]
    if package in ("flax", "optax", "sklearn"):
        return 'pip install "ffjax[examples]".'
    return f"install {package or 'what it imports'} into this environment ({sys.executable})."


def _function(module: types.ModuleType, where: str, name: str) -> Callable[..., object]:
    found = getattr(module, name, None)
    if callable(found):
        return typing.cast("Callable[..., object]", found)
    if found is not None:
        raise FfjaxError(f"{name!r} in {where} is {type(found).__name__}, no function. Remedy: name the train step.")
    own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    raise FfjaxError(
        f"{where} has no function {name!r}{did_you_mean(name, own)}. "
        f"Remedy: use one of {', '.join(own) or 'its functions'}."
    )


def _call(function: Callable[..., object], args: tuple[object, ...], what: str) -> Callable[..., object]:
    made = _guarded(function, args, what)
    if not callable(made):
        raise FfjaxError(f"{what} returned {type(made).__name__}, no function. Remedy: make it return the train step.")
    return typing.cast("Callable[..., object]", made)


def _guarded(function: Callable[..., object], args: tuple[object, ...], what: str) -> object:
    try:
        return function(*args)
    except FfjaxError:
        raise
    except Exception as error:
        raise _failed(what, error) from error


# -- Config


def _config(module: types.ModuleType, where: str, preset: str | None, settings: Mapping[str, str]) -> object | None:
    cls = getattr(module, "Config", None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        if preset is not None or settings:
            wanted = "settings" if preset is None else f"preset {preset!r}"
            raise FfjaxError(
                f"{where} has no dataclass Config for {wanted}. Remedy: define Config, make_<step>(config) and "
                "example_args(config), or leave --preset and --set out."
            )
        return None
    maker: Callable[..., object] = cls
    if preset is not None:
        # A class method of Config itself, not of a base.
        presets = [n for n, v in vars(cls).items() if isinstance(v, classmethod) and not n.startswith("_")]
        if preset not in presets:
            raise FfjaxError(
                f"{where} has no preset {preset!r}{did_you_mean(preset, presets)}. Remedy: use one of "
                f"{', '.join(presets) or 'none'}, or --set FIELD=VALUE."
            )
        maker = getattr(cls, preset)
    config = _guarded(maker, (), f"{where}:Config" + (f".{preset}" if preset else ""))
    return _replaced(config, cls, where, settings)


def _replaced(config: object, cls: type, where: str, settings: Mapping[str, str]) -> object:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    values: dict[str, object] = {}
    for name, text in settings.items():
        if name not in names:
            raise FfjaxError(
                f"Config of {where} has no field {name!r}{did_you_mean(name, names)}. "
                f"Remedy: use one of {', '.join(names)}."
            )
        try:
            values[name] = read_value(text, hints[name])
        except ValueError as error:
            raise FfjaxError(
                f"--set {name}={text}: {error}. Remedy: write it like its present value, {getattr(config, name)!r}."
            ) from error

    if not values:
        return config
    what = f"{where}:Config with {', '.join(f'{n}={v}' for n, v in settings.items())}"
    return _guarded(functools.partial(dataclasses.replace, **values), (config,), what)


def read_value(text: str, kind: object) -> object:
    """A value of a field's type from text.

    Raises ValueError that says what was expected.

    >>> read_value("48", int), read_value("true", bool), read_value("64,128", tuple[int, ...])
    (48, True, (64, 128))
    >>> read_value("none", int | None)
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in inner and text.lower() == "none":
            return None
        for one in inner:
            if one is not type(None):
                try:
                    return read_value(text, one)
                except ValueError:
                    continue
        raise ValueError(f"{text!r} is none of {kind}")
    if origin in (tuple, list):
        element = inner[0] if inner else object
        items = [read_value(item.strip(), element) for item in text.strip("()[]").split(",") if item.strip()]
        return tuple(items) if origin is tuple else items
    if origin is typing.Literal:
        if text not in map(str, inner):
            raise ValueError(f"{text!r} is none of {', '.join(map(str, inner))}")
        return next(one for one in inner if str(one) == text)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"{text!r} is neither true nor false")
        return words[text.lower()]
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}") from None
    if kind is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- arguments


def _args(
    module: types.ModuleType, where: str, target: str, given: str | None, config: object | None
) -> tuple[object, ...]:
    name, source = EXAMPLE_ARGS, where
    if given is not None and ":" in given:
        source, name = _split(given)
        module = module if source == where else _module(source)
    elif given is not None:
        name = given
    if given is None and not hasattr(module, EXAMPLE_ARGS):
        raise FfjaxError(
            f"{where} has no {EXAMPLE_ARGS}, so the shapes that {target} takes are unknown. Remedy: define\n"
            f"  def {EXAMPLE_ARGS}():\n"
            "      return jax.eval_shape(init_state), jax.ShapeDtypeStruct((64, 128), jnp.float32)\n"
            "which allocates nothing, or name such a function with --args file.py:function."
        )
    function = _function(module, source, name)
    # With a Config, a function that takes a parameter takes it; without one it must need none.
    takes = _positional(function)
    what = f"{source}:{name}"
    if takes and takes[0] and config is None:
        raise FfjaxError(f"{what} needs an argument, and there is no Config to give it. Remedy: let it take none.")
    if sum(takes) > 1:
        raise FfjaxError(f"{what} needs {sum(takes)} arguments. Remedy: let it take none, or the Config alone.")
    found = _guarded(function, (config,) if takes and config is not None else (), what)
    if not isinstance(found, (tuple, list)) or hasattr(found, "_fields"):
        raise FfjaxError(f"{what} returned {type(found).__name__}. Remedy: return a tuple of the step's arguments.")
    return tuple(found)


def _positional(function: Callable[..., object]) -> list[bool]:
    """For each positional parameter whether it must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.default is inspect.Parameter.empty for p in parameters if p.kind in kinds]
