"""Every function and dataclass of mechinterp, its arguments' types and shapes checked by beartype and jaxtyping.

jaxtyping's own import hook says more in its errors, and took three quarters of the tests' time: it checks twice, binds
arguments to names, and wraps functions within functions anew at every call of the one around them. Here those are
left as they are, with what the function around them has checked.
"""

import ast
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, TypeVar, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])
NAME = "_mechinterp_checked"
SENT = "mechinterp.engine.backends.stops"
"""A module that is left as it is: its functions are sent away as source, without what would check them."""


def checked(function: F) -> F:
    """A function that raises where an argument or what it returns has another type or shape than it says."""
    inner: Any = None

    @wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal inner
        if inner is None:  # at the first call all names of its module are there
            names = function.__globals__
            function.__annotations__ = {name: _resolved(hint, names) for name, hint in function.__annotations__.items()}
            inner = beartype(conf=BeartypeConf(violation_type=TypeError))(function)
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):  # in which a name of an axis has one size
            return inner(*args, **kwargs)

    return outer  # pyright: ignore[reportReturnType]


def checked_class(cls: type) -> type:
    """A dataclass whose fields are checked when one is made; another class as it is."""
    if is_dataclass(cls) and "__init__" in vars(cls):
        cls.__init__ = checked(cls.__init__)
    return cls


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """A hint without strings; Any where a name is only there for type checkers."""

    def holder() -> None: ...

    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:  # NameError mostly; whatever it is, the hint says nothing here
        return Any


class Decorator(ast.NodeTransformer):
    """Puts `checked` nearest to each function of a module or class, and `checked_class` farthest from each class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(ast.copy_location(ast.Name(NAME, ast.Load()), node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.copy_location(ast.Name(f"{NAME}_class", ast.Load()), node))
        return node


class CheckedLoader(SourceFileLoader):
    """Compiles a module with `Decorator`; nothing is cached, so no other run sees it."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = Decorator().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        vars(module).update({NAME: checked, f"{NAME}_class": checked_class})
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds mechinterp's modules for `CheckedLoader`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "mechinterp" or fullname == SENT:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            loader: Loader = CheckedLoader(spec.loader.name, spec.loader.path)
            spec.loader = loader
        return spec


def install() -> None:
    """Check whatever of mechinterp is imported from now on."""
    sys.meta_path.insert(0, Finder())
