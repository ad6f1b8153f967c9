"""Conformance checks that any plugin's own tests call; itself a pytest plugin, loaded with `-p corenas.testing`.

One thread a process: small tensors gain nothing from more, and tests run side by side. torch reads this when it is
first imported, so nothing here may import it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
