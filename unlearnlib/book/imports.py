"""Which modules of the library a notebook runs: those that its code imports, and all that these import."""

import ast
import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import grimp
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode


def imported_files(notebook: NotebookNode, package: str = "unlearnlib") -> dict[str, Path]:
    """The files of those modules of ``package`` that ``notebook`` imports, directly or not, by the modules' names.

    ``package`` is the one that ``import`` would find now. To import a module is to run the ``__init__`` of each
    package around it, too. What is imported by a name made up at run time is not seen.
    Raises ValueError if there is no such package, or a module of it is no Python.
    """
    try:
        graph = grimp.build_graph(package, cache_dir=None)
    except grimp.exceptions.SourceSyntaxError as error:
        raise ValueError(f"a module of {package} cannot be read: {error}") from error
    for module in graph.modules - {package}:
        graph.add_import(importer=module, imported=module.rpartition(".")[0])
    direct = {name for cell in notebook.cells if cell.cell_type == "code" for name in _imports(cell.source)}
    direct &= graph.modules
    modules = direct.union(*map(graph.find_upstream_modules, direct))
    [folder] = importlib.util.find_spec(package).submodule_search_locations
    return {module: _file(Path(folder).parent.joinpath(*module.split("."))) for module in sorted(modules)}


def _file(path: Path) -> Path:
    """The file of the module or package at ``path``; ``find_spec`` would import what is around it."""
    package = path / "__init__.py"  # a folder without it may be what another branch left behind
    return package if package.is_file() else path.with_suffix(".py")


def _imports(code: str) -> Iterator[str]:
    """Every name that ``code`` imports or imports from, be it a module's or not."""
    with contextlib.suppress(SyntaxError):  # a cell that cannot be read imports nothing: it fails when it is run
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(code))):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (node.module, *(f"{node.module}.{name.name}" for name in node.names))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").endswith("_magic"):
                yield from _imports(node.args[-1].value)  # what %time or %%time is given
