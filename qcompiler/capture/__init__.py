"""Models from files and from PyTorch. The package can be called: `qcompiler.capture(module, example_inputs)`.

Python binds a package to its name in the parent as soon as any part of it is imported, so the public function
`qcompiler.capture` would otherwise be there only until then.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `qcompiler.capture.torch.capture`."""
        from qcompiler.capture.torch import capture

        return capture(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
