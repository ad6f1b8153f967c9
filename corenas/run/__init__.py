"""The application: a spec, its run directory and its stages. The library knows nothing of it."""
