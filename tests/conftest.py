"""What the test files share: the server that processes of tests are forked from."""
from __future__ import annotations

import multiprocessing
import pkgutil

import ris_nb

# A process that a test needs for itself is forked from a server that has imported everything once; it runs nothing, so it has no threads.
multiprocessing.set_forkserver_preload([
    "pytest", "nbdev.test", "torch._dynamo", "transformers.models.bert.modeling_bert",
    *(f"ris_nb.{module.name}" for module in pkgutil.iter_modules(ris_nb.__path__))])
