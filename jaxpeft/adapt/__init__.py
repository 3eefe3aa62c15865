"""One frozen model, one small delta: every module here is one method (or one paper's family of them).

A method enters the library by standing in this folder and registering its factory; no list needs editing.
"""

import importlib
import pkgutil

from jaxpeft.method import METHODS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

globals().update({name: entry.factory for name, entry in METHODS.items() if entry.family == "adapt"})
__all__ = sorted(name for name, entry in METHODS.items() if entry.family == "adapt")
