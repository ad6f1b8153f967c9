"""Conformance checks that any plugin's own tests call; itself a pytest plugin, loaded with `-p corenas.testing`.

There is a module for each kind of component, with a list of its promises (`corenas.testing.searchers.searcher_checks`),
one for searchable layers, for listeners and for whole distributions. A check is a function named as a promise: it takes
the component's options, and fails if they do not keep it. `corenas.testing.small` is what checks run components on.

One thread a process: small tensors gain nothing from more, and tests run side by side. torch reads this when it is
first imported, so nothing here may import it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
