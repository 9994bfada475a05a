"""What the test files share: the server that processes of tests are forked from, and the order of the tests."""
from __future__ import annotations

import multiprocessing
import pkgutil

import ris_nb

# A process that a test needs for itself is forked from a server that has imported everything once; it runs nothing, so it has no threads.
multiprocessing.set_forkserver_preload([
    "pytest", "nbdev.test", "torch._dynamo", "transformers.models.bert.modeling_bert",
    *(module.name for module in pkgutil.walk_packages(ris_nb.__path__, "ris_nb.") if "._" not in module.name)])


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that several processes end together: the browser, the chapters, their solutions, the rest."""
    first = "test_browser.py", "test_notebooks.py"
    items.sort(key=lambda item: (first.index(item.path.name) if item.path.name in first else 2, item.path.name == first[1] and "solutions" in item.name))
