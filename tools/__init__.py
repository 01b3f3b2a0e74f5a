"""Programs beside the method, run as `python -m tools.evaluate`."""
